"""Makes a command's settings from its command line and a YAML file. argparse reads, pydantic checks, the command line
wins."""

from __future__ import annotations

import argparse
import itertools
import os
import select
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.extras import missing_module
from megatron_tiedlora.base.logs import show_messages
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.yaml_files import read_yaml_mapping
from megatron_tiedlora.config.data_fields import HUB_NAMES, TEMPLATE_HASH
from megatron_tiedlora.config.fields import (
    AnySettings,
    CommandSettings,
    field_choices,
    field_flag,
    field_group,
    takes_words,
    validate_settings,
)
from megatron_tiedlora.config.other_names import unknown_names, value_meant

# Names in a run's run.yaml that hold for that run only. They are ignored, so that the file can be given to --config.
RECORDED_NAMES = ("ranks", "versions", HUB_NAMES, TEMPLATE_HASH, "output_dir", "resume", "take_over", "base_differs")
RECORD_MARK = "versions"
_TRUE_OR_FALSE = "{true,false}"
_COMMAND_LINE_ONLY = ("take_over", "base_differs")  # the user decides these anew at each start


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line UserError instead of printing its usage and exiting."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(message)

    def add_argument(self, *names: str, **keywords: Any) -> argparse.Action:
        """As of argparse; values that must be one of `choices` may be written in other letters."""
        if choices := keywords.get("choices"):
            keywords["type"] = lambda given: value_meant(names[0].lstrip("-"), given, choices)
        return super().add_argument(*names, **keywords)

    def add_adapter(self, what: str = "native adapter: a run's adapter/ folder") -> None:
        """Add the input flags of a command that reads an adapter, `what` in its help, and its base."""
        self.add_argument("--adapter", required=True, metavar="DIR", help=what)
        self.add_model()

    def add_model(self) -> None:
        """Add the flag for the base of an adapter."""
        base = (
            "the base model: folder, hub id or demo; or a folder of models, where it is found by its hashes"
            " [the one that the adapter names]"
        )
        self.add_argument("--model", metavar="M", help=base)

    def add_new_folder(self) -> None:
        """Add the flags of a command that writes a new folder."""
        self.add_argument(
            "--output", required=True, type=path_value, metavar="DIR", help="folder to write; must not exist"
        )
        self.add_argument(
            "--take_over", action="store_true", help="take DIR over from another start that is writing it"
        )

    def add_output(self) -> None:
        """Add the output flags of a command that converts an adapter and its base."""
        self.add_new_folder()
        self.add_argument(
            "--base_differs",
            action="store_true",
            help="continue although base or tokenizer differ from those of training; the output records this",
        )

    def parse_known_names(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`. Unknown flags are a UserError that says which are meant."""
        known = [option for action in self._actions for option in action.option_strings]
        flags = itertools.takewhile(lambda word: word != "--", argv)
        # Before argparse says which flag is missing: an unknown one may be what the user calls it.
        reject_unknown([word for word in flags if _is_flag(word) and word.partition("=")[0] not in known], known=known)
        namespace, unknown = self.parse_known_args(argv)
        reject_unknown(unknown, known=known)
        return namespace


def _is_flag(word: str) -> bool:
    """Whether argparse takes a word for a flag, and not for a value."""
    return word.startswith("--") and " " not in word


def reject_unknown(words: Sequence[str], *, known: Iterable[str]) -> None:
    """Raise UserError if there are `words` that belong to no flag. It says which of the `known` flags are meant."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]  # the other words may be their values
    if words:
        raise UserError(f"{unknown_names('argument', flags or words, list(known))}; see --help")


def path_value(given: str) -> Path:
    """`user_path` as the `type` of a parser's argument."""
    try:
        return user_path(given)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _metavar(annotation: Any, choices: Sequence[str] | None = None) -> str:
    """How the help shows the values of a type, or its choices: `N`, `X[,X...]`, `{a,b}`, `N|auto`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # typing.Union if it has a Literal
        kinds = [kind for kind in arguments if kind is not type(None)]
        return "|".join(_metavar(kind, choices).strip("{}" if len(kinds) > 1 else "") for kind in kinds)
    if typing.get_origin(annotation) is tuple:
        item = _metavar(arguments[0], choices)
        return f"{item}[,...]" if choices else f"{item}[,{item}...]"
    if typing.get_origin(annotation) is Literal:
        choices = arguments
    if choices:
        return "{" + ",".join(choices) + "}"
    return {int: "N", float: "X", bool: _TRUE_OR_FALSE}.get(annotation, "TEXT")


def build_parser(kind: type[CommandSettings]) -> CommandParser:
    """The parser of a command, with one flag per setting in the groups of `kind`."""
    parser = CommandParser(
        prog=kind.prog,
        usage=f"{kind.prog} {kind.usage}",
        description=kind.about,
        epilog="The YAML file of --config takes every flag under the same name; the command line wins.",
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in kind.groups.items()}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with settings under the same names")
    for name, field in kind.model_fields.items():
        keywords: dict[str, Any] = {"metavar": _metavar(field.annotation, field_choices(field))}
        if takes_words(field):
            keywords.update(nargs="+", metavar="TEXT")
        if keywords["metavar"] == _TRUE_OR_FALSE:  # a bare --dry_run means true
            keywords.update(nargs="?", const="true")
        default = kind.default_text(name)
        help_text = (field.description or "") + (f" [{default}]" if default else "")
        keywords.update(dest=name, help=help_text.replace("%", "%%"))
        groups[field_group(field)].add_argument(f"--{field_flag(name, field)}", **keywords)
    # The deepspeed and torch launchers add this before the user's arguments; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def read_yaml(path: str, known: Collection[str]) -> dict[str, Any]:
    """The values in a YAML file by the `known` names of settings. Raises UserError naming the file, and the line."""
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    content = read_yaml_mapping(file)
    if RECORD_MARK in content:
        counted = ("max_steps",) if content.get("epochs") is not None else ()
        content = {name: value for name, value in content.items() if name not in (*RECORDED_NAMES, *counted)}
    for name in _COMMAND_LINE_ONLY:
        if name in content:
            raise UserError(f"{path}: {name} is not read from a file; give --{name} on the command line")
    if unknown := unknown_names("setting", content, known):
        raise UserError(f"{path}: {unknown}")
    return content


def parse_settings(argv: Sequence[str], kind: type[AnySettings]) -> AnySettings:
    """Settings of `kind`: the command line wins over the file of --config, which wins over the defaults.

    Raises:
        UserError: something is unknown or out of range.
    """
    values = vars(build_parser(kind).parse_known_names(argv))
    values.pop("local_rank")
    config = values.pop("config")
    given = {name: value for name, value in values.items() if value is not None}
    names = {field_flag(name, field): name for name, field in kind.model_fields.items()}
    read = {names[flag]: value for flag, value in read_yaml(config, names).items()} if config else {}
    for one, other in (*kind.instead, *((other, one) for one, other in kind.instead)):
        if one in given:
            read.pop(other, None)
    with naming_file(config, read.keys() - given.keys()):
        return validate_settings({**read, **given}, kind)


@contextmanager
def naming_file(file: str | Path | None, names: Collection[str]) -> Iterator[None]:
    """Add the file's name to a UserError about one of the settings `names`, which came from `file`."""
    try:
        yield
    except UserError as error:
        if str(error).partition(" ")[0].removeprefix("--") in names:
            raise UserError(f"{file}: {error}") from None
        raise


def keep_from_others() -> None:
    """Set the umask so that others cannot write what this process and its children create."""
    os.umask(os.umask(0o077) | 0o002)


def adapter_flags(options: argparse.Namespace) -> str:
    """The flags that name an adapter and its base, as they were given, for a command that may follow."""
    words = ["--adapter", options.adapter, *(["--model", options.model] if options.model else [])]
    return shlex.join([*words, *(["--base_differs"] if options.base_differs else [])])


def run_command(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], *, reports: Callable[[], bool] = lambda: True
) -> NoReturn:
    """Run a command's `main(argv) -> exit status`. A UserError becomes one line on stderr and status 2; Ctrl-C is 130.

    If the reader of its output has ended, as `head` does, the command ends silently, with status 141 if it would have
    been 0. Whatever the user's umask, others cannot write what the command creates.

    Args:
        reports: whether to print the error; another rank on this host may have printed it.
    """
    keep_from_others()
    show_messages()
    status: Any
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        status = 128 + signal.SIGPIPE
    except (UserError, ModuleNotFoundError) as raised:
        error = raised if isinstance(raised, UserError) else missing_module(raised)
        if error is None:
            raise
        if reports():
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if _reader_is_gone():
        status = status or 128 + signal.SIGPIPE
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Whether the reader of standard output has ended. If so, what is still buffered is discarded."""
    output, poll = sys.__stdout__, select.poll()
    if output is None or sys.stdout is not output:  # closed by the caller, or replaced
        return False
    try:
        output.flush()
        poll.register(output, 0)  # no events requested: POLLERR of a closed pipe is always reported
        if not poll.poll(0):
            return False
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    return True
