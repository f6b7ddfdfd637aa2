"""Where things are, so that a test can move without a change."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
SUPPORT = ROOT / "tests" / "support"
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data sets, where they are beside the repository
