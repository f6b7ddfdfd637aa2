"""Small files of every format, rows of every task, and the one line that a refusal has to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tiedlora.base.messages import UserError

# One row of each task with fields of its own, as the hub has it.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "squad": {
        "id": "5733",
        "title": "Notre_Dame",
        "context": "The Grotto is a replica of the grotto at Lourdes.",
        "question": "What is the Grotto a replica of?",
        "answers": {"text": ["the grotto at Lourdes", "Lourdes"], "answer_start": [27, 41]},
    },
    "dialogsum": {
        "id": "test_0_1",
        "dialogue": "#Person1#: Hello, Ann!\n#Person2#: Hello. Coffee?",
        "summary": "Ann offers #Person1# a coffee.",
        "topic": "coffee",
    },
    "hellaswag": {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is ripping level tiles off.", "is holding a cube.", "sleeps.", "starts pulling up roofing."],
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": "3",
    },
    "iwslt2017": {"translation": {"de": "Vielen Dank, Chris.", "en": "Thank you so much, Chris."}},
    "gsm8k": {"question": "Ann has 2 apples and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
}


def write(path: Path, text: str | bytes) -> str:
    """Write a file; returns its name."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format of the path's suffix; returns its name."""
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".json":
        return write(path, json.dumps(rows))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def refusal(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The message of the UserError that a call with these arguments raises; it has to be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)
