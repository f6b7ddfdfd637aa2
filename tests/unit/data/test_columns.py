"""--columns: a row's fields under our names, the others under their own, and what is rejected by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_files import refusal, write_rows
from zoo_oracle import TOOLS, write_zoo_tokenizer

from megatron_tiedlora.config.fields import parse_columns
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.data.tokenizer import load_tokenizer

Row = dict[str, Any]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
PLAIN = {"prompt": "a", "completion": "b"}


def custom(tmp_path: Path, row: Row, columns: str, *, template: str | None = None, **options: Any) -> Example:
    path = write_rows(tmp_path / "data.jsonl", [row])
    reading = Reading(columns=parse_columns(columns), template=template)
    (example,) = load_split("custom", "test", files={"test": path}, seed=0, reading=reading, **options)
    return example


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "answer"),
    [
        ({"q": "Hi", "a": "Yo", "level": "easy"}, "prompt=q, completion=a", "Hi", " Yo"),
        # Fields of the shape that keep their names are read, optional ones too.
        ({"q": "Hi", "response": "Yo"}, "query=q", "User: Hi\nAssistant:", "Yo"),
        ({"q": "Hi", "a": "Yo", "system": "Be."}, "query=q,response=a", "System: Be.\nUser: Hi\nAssistant:", "Yo"),
        ({"q": "Hi", "a": "Yo", "history": [["x", "y"]]}, "query=q,response=a",
         "User: x\nAssistant: y\nUser: Hi\nAssistant:", "Yo"),
        # An optional field can be named, alone too.
        ({"query": "Hi", "response": "Yo", "sys": "Be."}, "system=sys", "System: Be.\nUser: Hi\nAssistant:", "Yo"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "role": "Be."},
         "system=role", "System: Be.\nUser: Hi\nAssistant:", "Yo"),
        # All that a shape needs is named: fields of others are left alone.
        ({"messages": TURNS, **PLAIN}, "messages=messages", "User: Hi\nAssistant:", "Yo"),
        ({"messages": TURNS, **PLAIN, "system": "Be."}, "prompt=prompt,completion=completion", "a", " b"),
        ({"query": "Hi", "response": "Yo", "label": 3}, "prompt=query,completion=response", "Hi", " Yo"),
        # Names change places, and a field with nothing in it has no name that counts.
        (PLAIN, "prompt=completion,completion=prompt", "b", " a"),
        ({"q": "Hi", "completion": "Yo", "prompt": None, "history": []}, "prompt=q", "Hi", " Yo"),
    ],
)  # fmt: skip
def test_columns_rename_fields(tmp_path: Path, row: Row, columns: str, prompt: str, answer: str) -> None:
    example = custom(tmp_path, row, columns)
    assert (example.prompt, example.completion) == (prompt, answer)


def test_the_input_and_references_of_a_row_are_read_under_either_name(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "references": ["three"]}
    renamed = {"task": "Add.", "context": "1 2", "result": "3", "more": ["three"]}
    found = custom(tmp_path, row, "output=output")
    assert "### Input:\n1 2\n" in found.prompt and found.references == ("3", "three")
    for given, columns in (
        ({**row, "task": "Add.", "instruction": None}, "instruction=task"),
        (renamed, "instruction=task,input=context,output=result,references=more"),
    ):
        assert custom(tmp_path, given, columns).prompt == found.prompt
        assert custom(tmp_path, given, columns).references == found.references


def test_the_tools_of_a_chat_are_read_under_either_name(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "tokenizer", template=TOOLS))
    for row, columns in (
        ({"dialog": TURNS, "tools": [{"name": "add"}]}, "messages=dialog"),
        ({"messages": TURNS, "apis": [{"name": "add"}]}, "tools=apis"),
        ({"dialog": TURNS, "apis": [{"name": "add"}]}, "messages=dialog,functions=apis"),
    ):
        assert '"name": "add"' in custom(tmp_path, row, columns, tokenizer=tokenizer).prompt


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        (PLAIN, "prompt=q", [":1: --columns prompt=q: there is no field 'q'", "'prompt', 'completion'", "null"]),
        (PLAIN, "promt=prompt", ["'promt' is not a field of ours (did you mean prompt?)"]),
        ({"question": "x", "response": "y"}, "question=query", ["'question' is not a field", "mean query=question?"]),
        ({**PLAIN, "q": "x"}, "prompt=q", [":1: --columns prompt=q: the row has a field 'prompt' too ('a')", "rename"]),
        ({**PLAIN, "sys": "x"}, "system=sys", ["--columns system=sys", "prompt/completion are read without 'system'"]),
        ({**PLAIN, "messages": TURNS, "t": []}, "tools=t",
         ["two shapes", "--columns tools=t,messages=messages or", "--columns tools=t,prompt=prompt,completion="]),
        ({**PLAIN, "messages": TURNS}, "prompt=prompt", ["'messages' looks like data", "completion=completion"]),
        ({"q": "x", "label": 1}, "query=q", ["'label', 'query', under the names of --columns"]),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(tmp_path: Path, row: Row, columns: str, words: list[str]) -> None:
    message = refusal(lambda: custom(tmp_path, row, columns))
    assert all(word in message for word in words), message


def test_columns_of_a_task_and_of_a_prompt_template(tmp_path: Path) -> None:
    row = {"q": "Hi", "a": "Yo", "level": "easy"}
    assert custom(tmp_path, row, "prompt=q,completion=a", template="{level} {prompt}").prompt == "easy Hi"
    squad = [{"passage": "C.", "question": "Q?", "answers": {"text": ["x"]}}]
    path, reading = write_rows(tmp_path / "squad.jsonl", squad), Reading(columns={"context": "passage"})
    (example,) = load_split("squad", "test", files={"test": path}, seed=0, reading=reading)
    assert example.prompt == "Context: C. Question: Q? Answer:"
    write_rows(tmp_path / "squad.jsonl", [{**squad[0], "context": "Other."}])
    message = refusal(lambda: load_split("squad", "test", files={"test": path}, seed=0, reading=reading))
    assert "the row has a field 'context' too ('Other.')" in message


@pytest.mark.parametrize("given", ["prompt", "prompt=", "=x", "prompt=a,prompt=b", ""])
def test_a_value_of_another_form(given: str) -> None:
    values = {"task": "custom", "train_file": "a.jsonl", "columns": given}
    assert "--columns" in refusal(lambda: make_settings(values))
