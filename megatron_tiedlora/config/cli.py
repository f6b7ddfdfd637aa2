"""Make a command's settings from its command line and the YAML files of --config and --adapters. argparse parses the
arguments and pydantic validates the values. The command line overrides the file of --config."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from megatron_tiedlora.base.files import LARGEST_YAML, parse_yaml, read_small_text, read_yaml_mapping
from megatron_tiedlora.base.installation import missing_module
from megatron_tiedlora.base.messages import UserError, count_text, naming, show_messages, shown, user_path
from megatron_tiedlora.config import fields
from megatron_tiedlora.config.adapter_settings import EvaluateSettings, MergeSettings, PushSettings
from megatron_tiedlora.config.other_names import unknown_names
from megatron_tiedlora.config.settings import Settings, make_settings

HUB_NAMES = "hub_names"  # in run.yaml: the hub ids of data and tokenizer
TEMPLATE_HASH = "chat_template_sha256"  # in run.yaml: hash of the content of --chat_template
# A run.yaml also has these names. They are ignored, so that the file can be given to --config.
START_HASH = "init_from_sha256"  # in run.yaml and checkpoints: hash of the tensor file of the adapter of --init_from
DATA_HASHES = "data_sha256_by_source"  # in run.yaml: hash of the training and validation data by name
RECORDED_NAMES = ("ranks", "versions", HUB_NAMES, TEMPLATE_HASH, START_HASH, DATA_HASHES)
RECORD_MARK = "versions"
_TRUE_OR_FALSE = "{true,false}"
# The settings of these commands have other names in other tools. Every command gives hints for these other names.
_NAMED = (Settings, EvaluateSettings, MergeSettings, PushSettings)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line UserError instead of printing usage and exiting."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(message)


def reject_unknown(words: Sequence[str], *kinds: type[fields.CommandSettings], known: Iterable[str]) -> None:
    """Raise UserError if `words`, the unknown arguments, is not empty. Suggest similar flags from `known`."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]  # words without a dash may be values
    if words:
        meant = unknown_names("argument", flags or words, list(known), fields.names_elsewhere(*kinds, *_NAMED))
        raise UserError(f"{meant}; see --help")


def _metavar(annotation: Any, choices: Sequence[str] | None = None) -> str:
    """Return the placeholder in the help for values of a type or for `choices`: `N`, `X[,X...]`, `{a,b}`, `N|auto`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _metavar(arguments[0], choices)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # with a Literal: typing.Union
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


def build_parser(kind: type[fields.CommandSettings]) -> CommandParser:
    """Return the parser of a command, with one flag per setting. The help lists the flags by the groups of `kind`."""
    usage = f"{kind.prog} {kind.usage}" if kind.groups else None
    parser = CommandParser(prog=kind.prog, usage=usage, description=kind.about, epilog=kind.examples)
    groups: dict[str, argparse._ActionsContainer] = {
        name: parser.add_argument_group(name, text) for name, text in kind.groups.items()
    }
    if groups:
        groups["run"].add_argument("--config", metavar="FILE", help="YAML file with settings under the same names")
        # The deepspeed and torch launchers add this flag first. Ranks are read from the environment.
        parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    for name, own in fields.declared(kind).items():
        field = kind.model_fields[name]
        keywords: dict[str, Any] = {"metavar": own.metavar or _metavar(field.annotation, own.choices)}
        default = kind.default_text(name)
        if own.words:
            keywords.update(nargs="*" if own.positional else "+", metavar=own.metavar or "TEXT")
        elif own.positional and not field.is_required():
            keywords.update(nargs="?")
        elif keywords["metavar"] == _TRUE_OR_FALSE and groups:  # a bare --dry_run means true
            keywords.update(nargs="?", const="true")
        elif keywords["metavar"] == _TRUE_OR_FALSE:  # takes no value, because a positional word may follow
            keywords, default = {"action": "store_const", "const": "true"}, ""
        help_text = (field.description or "") + (f" [{default}]" if default else "")
        keywords.update(help=help_text.replace("%", "%%"))
        if not own.positional:
            # For a command with groups, the value may be in a file.
            keywords.update(dest=name, required=field.is_required() and not groups)
        words = name if own.positional else f"--{own.flag or name}"
        (groups[own.group] if groups else parser).add_argument(words, **keywords)
    return parser


def parse_words(argv: Sequence[str], kind: type[fields.CommandSettings]) -> dict[str, Any]:
    """Return the values on a command line as text, by setting name. Raise UserError for unknown arguments."""
    parser = build_parser(kind)
    known = [option for action in parser._actions for option in action.option_strings]
    # Check this before argparse reports a missing flag, because the unknown flag may be its name in another tool.
    words = itertools.takewhile(lambda word: word != "--", argv)
    flags = [word for word in words if word.startswith("--") and " " not in word]  # for argparse, others are values
    reject_unknown([word for word in flags if word.partition("=")[0] not in known], kind, known=known)
    values, others = parser.parse_known_args(list(argv))
    reject_unknown(others, kind, known=known)
    return _given(values)


def split_words(
    argv: Sequence[str], kind: type[fields.CommandSettings], *, more: Sequence[str] = (), without: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Split the command line of a command that also accepts the flags of tiedlora train. Return the command's own
    settings by name, the settings of tiedlora train by name, and the arguments for tiedlora train.

    Args:
        more: further arguments, which are all for tiedlora train.
        without: settings of tiedlora train that the command rejects.

    Raises:
        UserError: an argument belongs to neither command.
    """
    own, rest = build_parser(kind).parse_known_args(list(argv))
    words = [*rest, *more]
    theirs, unknown = build_parser(Settings).parse_known_args(words)
    names = (*kind.model_fields, *(name for name in Settings.model_fields if name not in without))
    reject_unknown(unknown, kind, known=[f"--{name}" for name in names])
    if (config := vars(own).pop("config")) is not None:
        theirs.config, words = config, ["--config", config, *words]
    return _given(own), _given(theirs), words


def _given(values: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(values).items() if value is not None and name != "local_rank"}


def read_yaml(path: str, *kinds: type[fields.CommandSettings]) -> dict[str, Any]:
    """Return the settings of the commands `kinds` in a YAML file, by field name. Raise UserError if it is not valid."""
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"--config {path}: no such file; give a YAML file with settings")
    content = read_yaml_mapping(file)
    known = {own.flag or name: (name, own) for kind in kinds for name, own in fields.declared(kind).items()}
    if RECORD_MARK in content:
        ignored = {*RECORDED_NAMES, *(flag for flag, (_, own) in known.items() if own.lasts)}
        ignored |= {"max_steps"} if content.get("epochs") is not None else set()
        content = {name: value for name, value in content.items() if name not in ignored}
    for flag, (_, own) in known.items():
        if flag in content and own.lasts == "command":
            raise UserError(f"{path}: {flag} is not read from a file; give --{flag} on the command line")
    if unknown := unknown_names("setting", content, known, fields.names_elsewhere(*kinds, *_NAMED)):
        raise UserError(f"{path}: {unknown}")
    return {known[flag][0]: value for flag, value in content.items()}


def parse_settings(argv: Sequence[str], kind: type[fields.AnySettings]) -> fields.AnySettings:
    """Return the settings of `kind`. The command line overrides the file of --config, which overrides the defaults.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    given = parse_words(argv, kind)
    config = given.pop("config", None)
    read = read_yaml(config, kind) if config else {}
    with naming_file(config, read.keys() - given.keys()):
        return fields.validate_settings(kind.combined(read, given), kind)


@contextmanager
def naming_file(file: str | Path | None, names: Collection[str]) -> Iterator[None]:
    """Add the name of `file` to a UserError about one of the settings `names`, which were read from this file."""
    try:
        yield
    except UserError as error:
        if str(error).partition(" ")[0].removeprefix("--") in names:
            raise UserError(f"{file}: {error}") from None
        raise


def keep_from_others() -> None:
    """Set the umask so that other users cannot write the files that this process and its children create."""
    os.umask(os.umask(0o077) | 0o002)


def run_command(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], *, reports: Callable[[], bool] = lambda: True
) -> NoReturn:
    """Run a command's `main(argv)` and exit with its status. For a UserError, print one line on stderr and exit with 2.
    For Ctrl-C, exit with 130.

    If the program that reads the output has ended, as `head` does, the command ends without a message, and status 0
    becomes 141. Other users cannot write the created files, whatever the user's umask is.

    Args:
        reports: returns whether to print the error. Another rank on this host may have printed it already.
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
    """Return whether the program that reads standard output has ended. If it has, discard the buffered output."""
    output, poll = sys.__stdout__, select.poll()
    if output is None or sys.stdout is not output:  # the stream was closed or replaced
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


# The file of --adapters -----------------------------------------------------------------------------------------------
#
# The file is a YAML list. Each entry has the name of an adapter and the settings of this adapter.
#
#     - name: support
#       train_file: support.jsonl
#       rank: 4
#     - name: legal
#       train_file: legal.jsonl
#       learning_rate: 1e-4
#
# Settings that are not in an entry come from the command line. Settings that are not in `PER_ADAPTER` are the same for
# all adapters. An entry's `output_dir` replaces the default run folder RUN/NAME.

PER_ADAPTER = frozenset(fields.marked(Settings, per_adapter=True))
# The name of an adapter is also the name of a folder inside the run folder, so any file system must accept it.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
# Files and folders of the run beside the adapters' folders. A run of one adapter has the folder `adapter`.
_FILES_OF_RUN = ("adapter", "logs", "profile", "adapters.yaml", "table.csv", "run_status.json")
RUN_OF_ALL = "the run of all"  # a key that cannot be an adapter's name, because names have no blanks
# Settings of a run of several adapters that are not passed on to its adapters.
OF_ALL = fields.marked(Settings, of_group=True)


def read_adapters(path: str, given: Settings) -> dict[str, Settings]:
    """Return the settings of each adapter in a YAML file, by adapter name, in the file's order.

    Args:
        given: the settings from the command line. An entry of the file overrides them for its adapter.

    Raises:
        UserError: a setting is wrong; the message names the file, the entry and the setting.
    """
    check_together(given)
    shared = {name: getattr(given, name) for name in given.model_fields_set if name not in OF_ALL}
    found, taken = dict[str, Settings](), set[str]()
    file = adapters_path(path)
    text = read_small_text(file, kind="YAML", largest=LARGEST_YAML)
    for number, entry in enumerate(parse_yaml(text, list, source=str(file)), start=1):
        name, own = _checked_entry(entry, f"{path}: entry {number}")
        if name.lower() in _FILES_OF_RUN:
            raise UserError(f"{path}: entry {number}: the run itself has a file {shown(name)}; give a different name")
        if name.lower() in taken:
            raise UserError(f"{path}: entry {number}: another entry already has the name {shown(name)}; change it")
        taken.add(name.lower())
        with naming(f"{path}: {name}"):
            found[name] = make_settings(Settings.combined(shared, own))
    check_folders(path, {name: own.output_dir for name, own in found.items() if own.output_dir is not None})
    if not found:
        raise UserError(f"{path}: has no entries; write one entry for each adapter, beginning with '- name: '")
    _check_shared(path, found)
    return found


def adapters_path(given: str) -> Path:
    """Return the file that --adapters names. Raise UserError if it does not exist."""
    file = user_path(given)
    if file.is_dir():
        raise UserError(f"--adapters {given}: is a folder; give a YAML list, or start from an adapter with --init_from")
    if not file.is_file():
        raise UserError(f"--adapters {given}: no such file; give a YAML file with a list of adapters")
    return file


def check_together(given: Settings) -> None:
    """Raise UserError if a setting on the command line is not supported for a run of several adapters."""
    if given.resume not in ("none", "auto"):
        raise UserError(f"--resume {given.resume}: each adapter has its own checkpoints; give --resume auto")
    if others := [name for name in given.report_to if name != fields.TENSORBOARD]:
        raise UserError(f"--report_to {others[0]} is not implemented for --adapters; give {fields.TENSORBOARD} or none")


def _checked_entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the adapter name and the settings of an entry of the file, after checking them."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected 'name: value' lines, found a {type(entry).__name__}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "has no name" if name is None else f"cannot be called {shown(name)}"
        raise UserError(f"{where}: {problem}; give a name of letters, digits, '.', '_' and '-', at most 80 characters")
    others = fields.names_elsewhere(Settings)
    own = {key: value for key, value in entry.items() if key != "name"}
    if unknown := unknown_names("setting", own.keys() - Settings.model_fields.keys(), PER_ADAPTER, others):
        raise UserError(f"{where} ({name}): {unknown}")
    for key in own:
        if key not in PER_ADAPTER:
            raise UserError(
                f"{where} ({name}): {key} cannot differ between the adapters of a run; give it on the command line"
            )
    return name, own


def check_folders(path: str, output_dirs: Mapping[str, str]) -> None:
    """Raise UserError if two adapters have the same folder, or if one adapter's folder is inside another adapter's.

    The folder of RUN_OF_ALL may contain the adapters' folders, but not at a path that the run itself uses.
    """
    given: dict[Path, str] = {}
    for name, output_dir in output_dirs.items():
        folder = Path(os.path.realpath(user_path(output_dir)))
        if folder in given:
            raise UserError(f"{path}: {name}: output_dir is also the folder of {given[folder]}; change it")
        given[folder] = name
    for folder, name in given.items():
        holder = next((parent for parent in folder.parents if parent in given), folder)
        inside = folder.parts[len(holder.parts) :][:1]
        if inside and given[holder] != RUN_OF_ALL:
            where = f"the folder of {given[holder]}; give a different folder"
            raise UserError(f"{path}: {name}: output_dir is inside {where}")
        if any(part.startswith(".") or part.lower() in _FILES_OF_RUN for part in inside):
            where = f"{shown(inside[0])}, where the run itself has files"
            raise UserError(f"{path}: {name}: output_dir is inside {where}; give a different folder")


def _check_shared(path: str, found: Mapping[str, Settings]) -> None:
    """Raise UserError if the adapters' tasks have different defaults for a setting that all adapters must share."""
    (first, expected), *others = found.items()
    for name, settings in others:
        for field in Settings.model_fields:
            if field not in PER_ADAPTER and getattr(settings, field) != getattr(expected, field):
                of_first, of_other = (shown(getattr(one, field)) for one in (expected, settings))
                raise UserError(
                    f"{path}: {field} would be {of_first} for {first} and {of_other} for {name} by the defaults of"
                    f" their tasks, but {count_text(len(found), 'adapter')} must have the same value; give --{field}"
                )


HALVING_REASON = "halving: "  # prefix of the recorded reason if --halving ended an adapter's training


def competitors_of(settings: Mapping[str, Settings]) -> dict[str, tuple[str, ...]]:
    """Return {adapter name: names of the adapters that differ from it only in learning rate and output folder}."""
    same = {name: own.model_dump_json(exclude={"learning_rate", "output_dir"}) for name, own in settings.items()}
    return {name: tuple(other for other in same if other != name and same[other] == same[name]) for name in same}


def check_halving(settings: Mapping[str, Settings]) -> None:
    """Raise UserError if --halving has no adapters to compare, or if their best checkpoints are not chosen by loss."""
    competitors = competitors_of(settings)
    if not any(competitors.values()):
        raise UserError("--halving: no two adapters differ only in the learning rate; remove it")
    for name, own in settings.items():
        if competitors[name] and own.eval_metric != "loss":
            raise UserError(f"{name}: --halving compares validation losses; remove --eval_metric {own.eval_metric}")
