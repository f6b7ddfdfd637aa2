"""`tiedlora NAME ...`: lists the commands, and runs one. It imports no command but that one, so its help is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from megatron_tiedlora.base.command_names import COMMANDS, PROGRAM, find_command, other_command
from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.version import __version__
from megatron_tiedlora.base.wording import nearest_name

_LOCAL_RANK = ("--local_rank", "--local-rank")


def help_text() -> str:
    """The text of `tiedlora --help`."""
    width = max(len(command.name) for command in COMMANDS) + 2
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [...]      {PROGRAM} COMMAND --help      {PROGRAM} --version",
            "",
            "Tied-LoRA fine-tuning of language models on DeepSpeed.",
            "",
            *(f"  {command.name:{width}}{command.about}" for command in COMMANDS),
            "",
            f"  {PROGRAM} prepare-demo; {PROGRAM} train    trains the demo model in this one process (extra demo)",
            f"  {PROGRAM} run --num_gpus 4 ...           trains on four GPUs of this machine (extra train)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the first word names, and exit with its status: 2 if there is no such command."""
    words = _without_local_rank(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words:
        _leave(f"error: give a command; `{PROGRAM} --help` lists them", status=2)
    name, *rest = words
    if name in ("-h", "--help"):
        _leave(help_text())
    if name in ("-V", "--version"):
        _leave(f"{PROGRAM} {__version__}")
    command = find_command(name)
    if command is None:
        ours = other_command(name)
        near = f" (here it is {PROGRAM} {ours})" if ours else nearest_name(name, [one.name for one in COMMANDS])
        _leave(f"error: {PROGRAM} {name}: no such command{near}; `{PROGRAM} --help` lists them", status=2)
    run(command.name, rest)


def run(name: str, argv: Sequence[str] | None = None, **options: Any) -> NoReturn:
    """Run a command with its words, by default those of this process, and exit with its status.

    Args:
        options: further arguments of the command's `main`.
    """
    # These import what the help of the front does not need.
    from megatron_tiedlora.config.cli import run_command
    from megatron_tiedlora.runtime.launch_env import first_to_fail

    command = find_command(name)
    assert command is not None
    words = sys.argv[1:] if argv is None else argv
    run_command(partial(call, name, **options), words, reports=first_to_fail if command.is_rank else lambda: True)


def call(name: str, argv: Sequence[str], **options: Any) -> int:
    """Parse the words of a command and run it; returns its exit status. Its module, which may import torch, is imported
    only after its words are right.

    Raises:
        UserError: a word is wrong, or the command fails with one line.
    """
    from megatron_tiedlora.config.cli import parse_settings

    command = find_command(name)
    assert command is not None
    module, _, kind = command.settings.partition(":")
    reader = getattr(importlib.import_module(f"megatron_tiedlora.config.{module}"), kind)
    settings = parse_settings(argv, reader) if isinstance(reader, type) else reader(argv)
    status: int = importlib.import_module(f"megatron_tiedlora.commands.{command.module}").main(settings, **options)
    return status


def _without_local_rank(words: Sequence[str]) -> list[str]:
    """`words` without the rank that a launcher puts before the command; ranks are read from the environment."""
    if words and words[0].startswith(tuple(f"{name}=" for name in _LOCAL_RANK)):
        return list(words[1:])
    return list(words[2:]) if words and words[0] in _LOCAL_RANK else list(words)


def _leave(text: str, *, status: int = 0) -> NoReturn:
    """Show the text, on stderr if it is an error, and exit."""
    show(*text.split("\n"), file=sys.stderr if status else None)
    sys.exit(status)
