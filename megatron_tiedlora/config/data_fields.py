"""How rows become tokens: checks and choices of the settings that training and evaluation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megatron_tiedlora.base.errors import as_given

AddBos = Literal["auto", "true", "false"]
SpecialTokensInText = Literal["refuse", "plain", "control"]
TrainOn = Literal["all_turns", "last_turn"]

HUB_NAMES = "hub_names"  # in run.yaml: the ids of data and tokenizer that come from the hub
TEMPLATE_HASH = "chat_template_sha256"  # in run.yaml: of the content of --chat_template

FILES_HELP = (
    ".jsonl, .json, .csv, .parquet, .arrow (also .gz), a folder, a pattern, a hub id (id:config:split), or several with"
    " commas"
)


def boolean_word(value: Any) -> Any:
    """A YAML file's true or false as the word; any other value is unchanged."""
    return str(value).lower() if isinstance(value, bool) else value


def parse_columns(text: str | None) -> Mapping[str, str] | None:
    """Our field -> the user's field, of `--columns OURS=YOURS[,...]`; None if it is not given.

    Raises:
        ValueError: it has another form, or names one of our fields twice.
    """
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if not all(columns.values()) or not all(columns) or len(columns) < len(pairs):
        said = f"--columns {as_given(text)}: expected OURS=YOURS[,...]"
        raise ValueError(f"{said} with each of ours once, e.g. prompt=query,completion=response")
    return columns


def checked_columns(text: str | None) -> str | None:
    """The value of --columns as it was given. Raises ValueError as `parse_columns`."""
    parse_columns(text)
    return text
