"""What docs/guide.md tells a newcomer to paste: its commands, and the file of several adapters."""

from __future__ import annotations

import re
import shlex

from folders import ROOT

TEXT = (ROOT / "docs" / "guide.md").read_text()
COMMANDS = [line.strip() for line in TEXT.replace("\\\n", "").splitlines() if line.startswith("    ")]
(ADAPTERS,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def words_of(command: str, shared: str) -> list[str]:
    """The words of a command, with another folder in the place of /shared."""
    return [re.sub(r"(^|=)/shared/", rf"\g<1>{shared}/", word) for word in shlex.split(command)]
