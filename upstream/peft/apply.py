"""Put Tied-LoRA into a checkout of PEFT, as its pull request would: `python upstream/peft/apply.py CHECKOUT`.

The folders beside this file hold the new files. `changes.patch` changes files that PEFT has. It was made for the source
distribution of PEFT 0.21.2, with docs/ and method_comparison/ of the repository at 5d602fd (2026-08-21). A checkout
may lack some of the folders: the source distribution has only src/ and tests/.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
PARTS = ("src", "tests", "docs", "method_comparison")


def main(arguments: list[str]) -> str:
    """Apply the change to a checkout and return a message. Exits with a message if the checkout does not fit."""
    if len(arguments) != 1:
        sys.exit("usage: python upstream/peft/apply.py CHECKOUT")
    checkout = Path(arguments[0]).resolve()
    if not (checkout / "src/peft/__init__.py").is_file():
        sys.exit(f"{checkout} has no src/peft; give a checkout or an unpacked source distribution of PEFT")
    if (checkout / "src/peft/tuners/tied_lora").exists():
        sys.exit(f"{checkout} has Tied-LoRA already; give a clean checkout of PEFT")
    parts = [part for part in PARTS if (checkout / part).is_dir()]
    only = [f"--include={part}/*" for part in parts]
    # git must not take paths as relative to a repository around the checkout; it writes all of the change or nothing
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    command = ["git", "apply", *only, str(HERE / "changes.patch")]
    done = subprocess.run(command, cwd=checkout, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0]
        sys.exit(f"changes.patch does not fit {checkout} ({reason}); adapt it, it was made for PEFT 0.21.2")
    for part in parts:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE / part, checkout / part, dirs_exist_ok=True, ignore=ignored)
    return f"Tied-LoRA is now in {', '.join(parts)} of {checkout}"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
