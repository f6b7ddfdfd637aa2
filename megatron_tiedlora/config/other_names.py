"""Translate flags, YAML keys and values of other tools into the names that this package uses.

Most names from other tools are declared with their setting. `other_names.yaml` has those that need a longer hint. In a
hint, `{name}` is a setting of this package, which is shown as a flag or a key. A command shows a hint only if it has
all settings in the hint. For any other unknown name, the most similar known name is suggested.
"""

import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_tiedlora.base import files
from megatron_tiedlora.base.messages import nearest_name, shown

_MOST_NAMES = 8  # maximum number of unknown names in one message

_SECTIONS = files.read_yaml_mapping(Path(__file__).with_suffix(".yaml"))
_TABLES: Mapping[str, Mapping[str, str]] = {
    section: {name: answer for answer, names in rows.items() for name in names.split()}
    for section, rows in _SECTIONS.items()
}
SENTENCES, NOT_OFFERED = _TABLES["sentences"], _TABLES["not_offered"]
OTHER_METHODS, OTHER_FORMATS, OTHER_DTYPES = _TABLES["methods"], _TABLES["formats"], _TABLES["dtypes"]
OTHER_SCHEDULES, OTHER_GPUS = _TABLES["schedules"], _TABLES["gpus"]
ADAPTER_NAMES = (  # for commands that read an adapter
    "adapters lora lora_path adapter_path adapter_name_or_path peft_model_id peft_path adapter_dir lora_dir"
)
OUTPUT_NAMES = "output_dir out out_dir save_dir save_path output_path export_dir output_folder"


def value_meant(given: str, choices: Sequence[str], others: Mapping[str, str]) -> str:
    """Return the choice that a value means. A value that means none of `choices` is returned unchanged.

    Case is ignored, and `_` is read as `-`. `others` maps names of values in other tools to choices or to hints.
    """
    named = {alias: value for alias, value in others.items() if value in choices}
    return {**named, **{_plain(choice): choice for choice in choices}}.get(_plain(given), given)


def value_hint(given: str, choices: Sequence[str], others: Mapping[str, str]) -> str:
    """Return a hint for an unknown value of a setting, in the form ' (...)', or '' if there is none."""
    answer = others.get(_plain(given))
    return nearest_name(given, choices) if answer is None else f" ({_written(answer, '--')})"


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def unknown_names(
    kind: str, given: Iterable[object], known: Collection[str], others: Mapping[str, Sequence[str]]
) -> str:
    """Return the text `unknown KINDs A, B` with hints for the given names that are not known; '' if all are known.

    Args:
        others: see `name_hint`.
    """
    names = list(dict.fromkeys(name for name in given if name not in known))
    said = [
        f"{name if name.startswith('-') else shown(name)}{name_hint(name, known, others)}"
        if isinstance(name, str)
        else shown(name)
        for name in names[:_MOST_NAMES]
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"unknown {kind}{'s' if len(said) > 1 else ''} {', '.join(said)}{more}" if said else ""


def name_hint(given: str, known: Iterable[str], others: Mapping[str, Sequence[str]]) -> str:
    """Return a hint for an unknown name in the form ' (...)', or '' if there is none.

    Args:
        given: a flag with its dashes, or a YAML key. The names in `known` have the same form.
        others: hints by the name in other tools (`names_elsewhere`). The hints of this command come first.
    """
    names = list(known)
    dashes = "--" if given.startswith("-") else ""
    bare = given.lstrip("-").replace("-", "_").lower()
    if f"{dashes}{bare}" in names:
        return f" (did you mean {dashes}{bare}?)"
    answers = [*others.get(bare, ()), *([SENTENCES[bare]] if bare in SENTENCES else [])]
    held = {name.lstrip("-") for name in names}
    for answer in answers:
        if _settings_in(answer) <= held:
            return f" (here it is {_written(answer, dashes)})"
    if bare in NOT_OFFERED:
        return f" ({NOT_OFFERED[bare]})"
    # If there are hints for the name but this command lacks the setting, a similar name would be misleading.
    return "" if answers else nearest_name(given, names)


def _written(answer: str, dashes: str) -> str:
    return answer.format(**{name: dashes + name for name in _settings_in(answer)})


def _settings_in(answer: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(answer) if name}
