"""From the command line and a YAML file to settings: argparse reads, pydantic checks, the command line wins.

Works for the settings of any command; those of launch/train.py (`Settings`) are the default.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import nearest_name
from megatron_tiedlora.base.yaml_files import read_yaml_mapping
from megatron_tiedlora.config.fields import (
    AnySettings,
    CommandSettings,
    field_choices,
    field_flags,
    field_group,
    validate_settings,
)
from megatron_tiedlora.config.settings import Settings

# What a run's run.yaml says of that run alone: passed over, so that the file can be given back with --config.
RECORDED_NAMES = ("ranks", "versions", "output_dir", "resume", "take_over", "base_differs")
RECORD_MARK = "versions"
_COMMAND_LINE_ONLY = ("take_over", "base_differs")  # what a user decides at one start


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, in one line, instead of printing its usage and exiting."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(message)

    def add_output(self) -> None:
        """The flags of a command that makes something of an adapter and its base."""
        self.add_argument(
            "--output", required=True, type=path_value, metavar="DIR", help="folder to write; must not exist"
        )
        self.add_argument(
            "--take_over", action="store_true", help="take DIR from another start that is about to write there"
        )
        self.add_argument(
            "--base_differs",
            action="store_true",
            help="continue although base or tokenizer differ from those of the training, which the output then says",
        )

    def parse_known_names(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; an unknown flag is rejected with the nearest known one."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown argument {name}{nearest_name(name, known)}; see --help")
        return namespace


def path_value(given: str) -> Path:
    """`user_path`, as the type of an argument of a parser."""
    try:
        return user_path(given)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _value_kind(annotation: Any) -> tuple[str, tuple[str, ...] | None]:
    """(metavar, choices) of a field's type."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)  # of a Literal it is the second
    options = typing.get_args(annotation) if is_union else (annotation,)
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is Literal:
        return "", typing.get_args(kind)
    if kind is bool:
        return "", ("true", "false")
    if typing.get_origin(kind) is tuple:
        item = "TEXT" if typing.get_args(kind)[0] is str else "N"
        return f"{item}[,{item}...]", None
    return {int: "N", float: "X"}.get(kind, "TEXT"), None


def build_parser(kind: type[CommandSettings] = Settings) -> CommandParser:
    """The parser of a command, with one flag per setting, in the groups of `kind`."""
    parser = CommandParser(
        prog=kind.prog,
        description=kind.about,
        epilog="Every flag can stand in the YAML file of --config under the same name; the command line wins.",
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in kind.groups.items()}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with settings under the same names")
    for name, field in kind.model_fields.items():
        metavar, choices = _value_kind(field.annotation)
        choices = field_choices(field) or choices
        keywords: dict[str, Any] = {"metavar": "{" + ",".join(choices) + "}" if choices else metavar}
        if choices == ("true", "false"):  # a bare --dry_run means true
            keywords.update(nargs="?", const="true")
        default = kind.default_text(name)
        help_text = (field.description or "") + (f" [{default}]" if default else "")
        flags = field_flags(name, field)
        groups[field_group(field)].add_argument(*flags, help=help_text.replace("%", "%%"), **keywords)
    # The deepspeed and torch launchers put these before the user's arguments; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def read_yaml(path: str, kind: type[CommandSettings] = Settings) -> dict[str, Any]:
    """The mapping in a YAML file of settings. Raises UserError naming the file, and the line where known."""
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    content = read_yaml_mapping(file)
    if RECORD_MARK in content:
        content = {name: value for name, value in content.items() if name not in RECORDED_NAMES}
    for name in content:
        if name in _COMMAND_LINE_ONLY:
            raise UserError(f"{path}: {name} is not read from a file; give --{name} on the command line")
        if name not in kind.model_fields:
            near = nearest_name(name, kind.model_fields) if isinstance(name, str) else ""
            raise UserError(f"{path}: unknown setting {shown(name)}{near}")
    return content


@overload
def parse_settings(argv: Sequence[str]) -> Settings: ...


@overload
def parse_settings(argv: Sequence[str], kind: type[AnySettings]) -> AnySettings: ...


def parse_settings(argv: Sequence[str], kind: type[CommandSettings] = Settings) -> CommandSettings:
    """Settings of `kind` from the command line, over those of the file given with --config, over the defaults.

    Raises:
        UserError: anything unknown or out of range, in one line.
    """
    values = vars(build_parser(kind).parse_known_names(argv))
    values.pop("local_rank")
    config = values.pop("config")
    given = {name: value for name, value in values.items() if value is not None}
    read = read_yaml(config, kind) if config else {}
    with naming_file(config, read.keys() - given.keys()):
        return validate_settings({**read, **given}, kind)


@contextmanager
def naming_file(file: str | Path | None, names: Collection[str]) -> Iterator[None]:
    """Where a UserError is about one of the settings `names`, which came from `file`, let it name the file too."""
    try:
        yield
    except UserError as error:
        if str(error).partition(" ")[0].removeprefix("--") in names:
            raise UserError(f"{file}: {error}") from None
        raise


def keep_from_others() -> None:
    """Make every file and folder that this process and its children create unwritable for others."""
    os.umask(os.umask(0o077) | 0o002)


def run_command(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], *, reports: Callable[[], bool] = lambda: True
) -> NoReturn:
    """Run a command's `main(argv) -> exit status`; a UserError becomes one line on stderr and status 2, Ctrl-C 130.

    Where what reads its output has ended, as `head` does, so does the command, without a word, and with status 141 if
    it had no other end.

    Whatever the user's umask, nothing that the command makes can be written by others.

    Args:
        speaks: whether to print the line; another rank on this host may have said it.
    """
    keep_from_others()
    status: Any
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        status = 128 + signal.SIGPIPE
    except UserError as error:
        if reports():
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if _reader_is_gone():
        status = status or 128 + signal.SIGPIPE
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, which is then flushed; what is left of it goes nowhere."""
    output, poll = sys.__stdout__, select.poll()
    if output is None or sys.stdout is not output:  # closed by who started this, or another stream
        return False
    try:
        output.flush()
        poll.register(output, 0)  # a pipe's end tells of this without being asked
        if not poll.poll(0):
            return False
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    return True
