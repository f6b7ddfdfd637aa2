"""From the command line and a YAML file to `Settings`: argparse reads, pydantic checks, the command line wins."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic.fields import FieldInfo

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.settings import (
    DEMO_DEFAULTS,
    GROUPS,
    PAPER_DEFAULTS,
    Settings,
    make_settings,
    nearest_name,
)

QUIET_SECONDS = 1.0
# What a run's run.yaml says of that run alone: passed over, so that the file can be given back with --config.
RECORDED_NAMES = ("ranks", "versions", "output_dir", "resume")
RECORD_MARK = "versions"


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, in one line, instead of printing its usage and exiting."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(message)

    def parse_known_names(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; an unknown flag is refused with the nearest known one."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown argument {name}{nearest_name(name, known)}; see --help")
        return namespace


def _value_kind(annotation: Any) -> tuple[str, tuple[str, ...] | None]:
    """(metavar, choices) of a field's type."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is Literal:
        return "", typing.get_args(kind)
    if kind is bool:
        return "", ("true", "false")
    if typing.get_origin(kind) is tuple:
        return "N[,N...]", None
    return {int: "N", float: "X"}.get(kind, "TEXT"), None


def _default_text(name: str, field: FieldInfo) -> str:
    if name in PAPER_DEFAULTS and name in DEMO_DEFAULTS:
        return f" [{PAPER_DEFAULTS[name]:g}; demo {DEMO_DEFAULTS[name]:g}]"
    if field.is_required() or field.default is None:
        return ""
    return f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"


def build_parser(prog: str = "train.py", description: str | None = None) -> CommandParser:
    """The parser with one flag per setting, in the groups of `GROUPS`."""
    parser = CommandParser(
        prog=prog,
        description=description or "Fine-tune a LLaMA model with Tied-LoRA.",
        epilog="Every flag can stand in the YAML file of --config under the same name; the command line wins.",
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    groups["run"].add_argument("--config", metavar="FILE", help="YAML file with settings under the same names")
    for name, field in Settings.model_fields.items():
        extra = typing.cast(dict[str, Any], field.json_schema_extra)
        metavar, choices = _value_kind(field.annotation)
        keywords: dict[str, Any] = {"metavar": "{" + ",".join(choices) + "}" if choices else metavar}
        if choices == ("true", "false"):  # a bare --dry_run means true
            keywords.update(nargs="?", const="true")
        help_text = (field.description or "") + _default_text(name, field)
        groups[extra["group"]].add_argument(f"--{name}", help=help_text.replace("%", "%%"), **keywords)
    # The deepspeed and torch launchers put these before the user's arguments; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file of settings. Raises UserError naming the file, and the line where known."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'name: value' lines, found a {type(content).__name__}")
    if RECORD_MARK in content:
        content = {name: value for name, value in content.items() if name not in RECORDED_NAMES}
    for name in content:
        if name not in Settings.model_fields:
            raise UserError(f"{path}: unknown setting {name!r}{nearest_name(str(name), Settings.model_fields)}")
    return content


def parse_settings(argv: Sequence[str]) -> Settings:
    """Settings from the command line, over those of the file given with --config, over the defaults.

    Raises:
        UserError: anything unknown or out of range, in one line.
    """
    values = vars(build_parser().parse_known_names(argv))
    values.pop("local_rank")
    config = values.pop("config")
    merged = read_yaml(config) if config else {}
    merged.update({name: value for name, value in values.items() if value is not None})
    return make_settings(merged)


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, quiet: bool = False) -> NoReturn:
    """Run a command's `main(argv) -> exit status`; a UserError becomes one line on stderr and status 2, Ctrl-C 130.

    Args:
        quiet: do not print the line: another rank on this host prints the same.
    """
    try:
        status = main(argv)
    except UserError as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        else:
            # The first rank that ends makes the launcher kill the others: let it be the one that prints.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(QUIET_SECONDS)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
