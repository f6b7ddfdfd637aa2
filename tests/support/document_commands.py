"""What README.md and docs/guide.md tell a newcomer to paste: their commands, files of adapters, and lines of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import dedent

from folders import ROOT

# The first word of a command. A block with one of them has nothing but commands and comments.
PROGRAMS = frozenset(
    (
        *("tiedlora", "deepspeed", "torchrun", "sbatch", "kubectl", "make", "pip", "hf", "python", "vllm"),
        *("llama-server", "docker", "srun", "git", "mpirun"),
    )
)


@dataclass(frozen=True)
class Document:
    """A document with commands.

    Attributes:
        commands: each as one line, without a comment behind it, in the order of the text.
        others: the blocks that are no commands: output, YAML, Python, formulas.
    """

    text: str
    commands: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def adapters(self) -> str:
        """The text of its file of several adapters."""
        (found,) = (block for block in self.others if block.startswith("- {name: "))
        return found


def read_document(name: str) -> Document:
    """The document of that name. Raises AssertionError for a block that mixes commands with anything else."""
    text = (ROOT / name).read_text()
    commands: list[str] = []
    others: list[str] = []
    for block in _blocks(text):
        lines = [line for line in re.sub(r" *\\\n *", " ", block).splitlines() if not line.startswith("#")]
        known = [line.split()[0] in PROGRAMS for line in lines]
        if any(known):
            assert all(known), f"{name}: commands beside something else:\n{block}"
            commands += [re.sub(r" +# .*", "", line).rstrip() for line in lines]
        else:
            others.append(block)
    return Document(text, tuple(commands), tuple(others))


def _blocks(text: str) -> Iterator[str]:
    """The blocks between fences, and the indented ones."""
    yield from re.findall(r"^```\w*\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^ {4}.*\n)+", plain, re.MULTILINE):
        yield dedent(block).strip("\n")


def words_of(command: str, places: Mapping[str, str]) -> list[str]:
    """The words of a command; one that begins with a name of `places`, or --FLAG= and it, has its place instead."""
    words = shlex.split(command)
    for name, place in places.items():
        words = [re.sub(rf"^(--\w+=)?{re.escape(name)}(?=/|$)", rf"\g<1>{place}", word) for word in words]
    return words


README, GUIDE = read_document("README.md"), read_document("docs/guide.md")
