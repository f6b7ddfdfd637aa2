"""Rows of every shape, and those of other names by --columns: one that does not fit is a line that names file, line,
field and fix."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.task_files import refusal, write, write_rows
from support.zoo_oracle import CHATML, LLAMA2, THINKING, TOOLS, answer, user

from megatron_tiedlora.config.fields import parse_columns
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.chat import chat_note, read_chat_template
from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example, Reading

Row = dict[str, Any]
PLAIN = {"prompt": "a", "completion": "b"}
ONE = {"messages": [user(), answer()]}
PREFERENCE = {"prompt": "x", "chosen": "y", "rejected": "z"}


@pytest.fixture
def tokenizer(tokenizer: Any) -> Any:
    """One whose chat template the test may change."""
    return copy.deepcopy(tokenizer)


def custom(path: str, **options: Any) -> list[Example]:
    return load_split("custom", "test", files={"test": path}, seed=0, **options)


def read_one(folder: Path, row: Row, **options: Any) -> Example:
    (example,) = custom(write_rows(folder / "data.jsonl", [row]), **options)
    return example


def test_the_chosen_answers_of_preference_data_can_be_trained(tmp_path: Path) -> None:
    """By the flags that the message gives, for texts and for chats."""
    chats = {"chosen": ONE["messages"], "rejected": ONE["messages"]}
    texts = {"prompt": "prompt", "completion": "chosen"}
    for row, columns, same in (
        (PREFERENCE, texts, {"prompt": "x", "completion": "y"}),
        (chats, {"messages": "chosen"}, ONE),
    ):
        assert read_one(tmp_path, row, reading=Reading(columns=columns)) == read_one(tmp_path, same)


def said(tmp_path: Path, rows: list[Row], **options: Any) -> str:
    """What a file of these rows is rejected with, without the file's name."""
    path = write_rows(tmp_path / "data.jsonl", rows)
    message = refusal(lambda: custom(path, **options))
    assert message.startswith(f"{path}:{len(rows)}"), message
    return message.removeprefix(path)


# Rows without a template ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x", "id": 1}, ["'question', 'id'", '"prompt", "completion"', '{"messages"}', "--columns"]),
        (PREFERENCE, ["'prompt', 'chosen', 'rejected'; expected", "Training on preference data is not supported;",
                      "only on the chosen answers, use --columns prompt=prompt,completion=chosen or --columns"]),
        ({**PLAIN, "rejected": "z"}, ["'rejected' looks like data", "completion=completion. Training on preference"]),
        ({**ONE, "rejected_response": "z"}, ["'rejected_response' looks like data", "Training on preference data"]),
        ({"prompt": "x", "completion": ""}, ["'completion'", "empty"]),
        ({"prompt": "x", "completion": None}, ["'completion'", "missing"]),
        ({"input": 3, "output": "x"}, ["'input'", "int"]),
        ({"instruction": " ", "output": "x"}, ["'instruction'", "empty"]),
        ({"prompt": "x", "completion": "\ud800"}, ["'completion'", "surrogate"]),
        ({"text": ""}, ["'text'", "empty"]),
        ({"text": "x", "label": 1}, ["'label' looks like data", "--columns text=text"]),
        ({"prompt": "x", "completion": "y", "system": "Be."}, ["'system' looks like data", "prompt/completion"]),
        ({"prompt": "x", "completion": "y", "tools": [{"name": "f"}]}, ["'tools'", "lists of messages, but"]),
        ({**ONE, "prompt": "x"}, ["'prompt' looks like data", "--columns messages=messages"]),
        ({**ONE, **PLAIN}, ["two shapes, messages and prompt/completion", "--columns messages=messages"]),
        ({**ONE, "images": ["a.png"]}, ["'images' looks like data"]),
        ({"prompt": [user()], "completion": "y"}, ["'prompt' is a list of messages, but 'completion' is 'y'"]),
        ({"prompt": [user(), answer()], "completion": [user(), answer("")]}, ["'completion', message 2", "is empty"]),
        ({"prompt": [user()], "completion": []}, ["'completion' is []", "not a list of messages"]),
        ({"prompt": [user()], "completion": [answer(train=False)]}, ["no answer of the assistant is supervised"]),
        ({"messages": "x"}, ["'messages'", "not a list"]),
        ({"messages": []}, ["'messages'", "not a list"]),
        ({"messages": ["x"]}, ["message 1", "not an object"]),
        ({"messages": [user(), user()]}, ["message 2", "'user' after 'user'"]),
        ({"messages": [user(), answer(), answer()]}, ["message 3", "'assistant' after 'assistant'"]),
        ({"messages": [answer(), user(), answer()]}, ["message 1", "'assistant' at the start"]),
        ({"messages": [user(), {"role": "system", "content": "x"}, answer()]}, ["message 2", "move it to the start"]),
        ({"messages": [user(), answer(), user()]}, ["last message is from 'user'"]),
        ({"messages": [{"role": "user"}, answer()]}, ["message 1", "'content' is missing"]),
        ({"messages": [user(), answer(" ")]}, ["message 2", "'content' is empty"]),
        ({"messages": [user(5), answer()]}, ["message 1", "int"]),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), answer()]}, ["message 1", "'image_url'"]),
        ({"messages": [{**user(), "images": ["x"]}, answer()]}, ["message 1", "'images' is not read"]),
        ({"messages": [user(), answer(weight=0.5)]}, ["message 2", "'weight' is 0.5"]),
        ({"messages": [{**user(), "train": True}, answer()]}, ["message 1", "only turns of the assistant"]),
        ({"messages": [user(), answer(train=False)]}, ["no answer of the assistant is supervised", "set 'train' to"]),
        ({"messages": [user(), answer(training=False)]}, ["message 2: 'training' is False", "give 'train'"]),
        ({"messages": [user(), answer(masked=True)]}, ["message 2: 'masked' is True", "give 'train'"]),
        ({"messages": [user(), {"role": "critic", "content": "x"}, answer()]}, ["role 'critic' is not known"]),
        ({**ONE, "tools": [{"name": "f"}]}, ["'tools' is not read by the plain", "--chat_template"]),
        ({"messages": [user(), answer()], "tools": "{"}, ["'tools' is '{', which is not JSON"]),
        ({"messages": [user(), answer()], "tools": {"name": "f"}}, ["'tools' is {'name': 'f'}, not a list"]),
        ({**ONE, "functions": {"name": "f"}}, ["'functions' is {'name': 'f'}, not a list"]),
        ({**ONE, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, ["both 'tools' and 'functions'", "remove"]),
        ({"messages": [user(), answer("", tool_calls=[{"id": 1}])]}, ["message 2", "has no function name"]),
        ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]}, ["message 1", "'value'"]),
        ({"messages": [user(), answer("", tool_calls=[{"name": "f", "parameters": {}}])]}, ["'arguments'"]),
        ({"messages": [user(), answer("", tool_calls=[{"name": "f", "arguments": "[1]"}])]}, ["[1], not an object"]),
        ({"messages": [user(), answer("", tool_calls=[{"name": "f"}], function_call={"name": "f"})]}, ["both"]),
        ({"messages": [{"content": "x"}, answer()]}, ["message 1: 'role' is missing; the message has 'content'"]),
        ({"system": "Be.", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]},
         [":1, message 1: field 'value' is empty"]),
        ({"system": "Be.", "conversations": [{"from": "gpt", "value": "x"}]}, [":1, message 1: turns are out of"]),
        ({"query": "x", "response": "y", "history": ["a"]}, ["'history'", "pairs"]),
        ({"instruction": "x", "output": "y", "history": [["a", ""]]}, ["answer of pair 1: field 'history' is"]),
        ({"query": "x", "response": "y", "history": [["a", "b"], [5, "d"]]}, ["question of pair 2", "5 (int)"]),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_one_line(tmp_path: Path, row: Row, words: list[str]) -> None:
    message = said(tmp_path, [row])
    assert all(word in message for word in words), message


def test_a_file_has_rows_of_one_shape(tmp_path: Path) -> None:
    message = said(tmp_path, [PLAIN, PLAIN, {"input": "a", "output": "b"}])
    assert message.startswith(":3: the row has shape input/output") and "has shape prompt/completion" in message
    first = write_rows(tmp_path / "a.jsonl", [PLAIN])
    second = write_rows(tmp_path / "b.jsonl", [{"input": "a", "output": "b"}])
    assert len(custom(f"{first},{second}")) == 2


# Rows with a template ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (LLAMA2, {"messages": [{"role": "system", "content": "x"}, user(), answer()]}, ["rejects these messages",
                                                                                        "not system"]),
        (CHATML, {"messages": [user(), {"role": "critic", "content": "x"}, answer()]}, ["role 'critic'", "template"]),
        (CHATML, {"messages": [user(), answer("", tool_calls=[{"name": "f"}]), user("x"), answer()]},
         ["'tool_calls' is not read", "another --chat_template"]),
        (CHATML, {**ONE, "tools": [{"name": "f"}]}, ["'tools' is not read"]),
        (CHATML, {"messages": [user(), answer(reasoning_content="x")]}, ["'reasoning_content' is not read"]),
        (TOOLS, {"messages": [user(), answer("", tool_calls=[{"name": "f", "arguments": {"<|im_end|>": 1}}]), user("x"),
                              answer()]}, [":1, message 2", "'tool_calls' contains '<|im_end|>'"]),
        (CHATML.replace("m.content", "m.content + m.thinking"), {"messages": [user(), answer(reasoning="x")]},
         [":1, message 2: 'reasoning' is not read", "rename it 'thinking'"]),
        ("{# tools tool_calls thinking 'critic' #}{% set mytools = xtool_calls %}" + CHATML + "tools 'critic'",
         {**ONE, "tools": [{"name": "f"}]}, ["'tools' is not read"]),
        ("{# tool_calls #}{{ xtool_calls }} 'tool_calls' " + CHATML,
         {"messages": [user(), answer("", tool_calls=[{"name": "f"}]), user("x"), answer()]},
         [":1, message 2: 'tool_calls' is not read"]),
        ("{{ enable_thinking }}{{ '<thinking>' }}{{ 'thinking' }}" + CHATML,
         {"messages": [user(), answer(thinking="x")]}, ["'thinking' is not read"]),
        ("{# 'critic' #}{{ 'critic' }} 'critic'" + CHATML,
         {"messages": [user(), {"role": "critic", "content": "x"}, answer()]}, [":1, message 2: role 'critic' is not"]),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", ONE,
         [":1, message 1", "does not write the text ('Hi')", "another --chat_template"]),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         {"query": "Hi", "response": "Yo", "system": "Be brief."}, [":1, field 'system'", "the text ('Be brief.')"]),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         {"query": "Hi", "response": "Yo", "system": "短く。"}, ["does not write the text ('短く。')"]),
        ("{% for m in messages %}{{ m.content }}{% for c in (m.tool_calls or [])[:1] %}{{ c.function.name }}"
         "{% endfor %}{% endfor %}",
         {"messages": [user(), answer("", tool_calls=[{"name": "f"}, {"name": "gg"}]), user("x"), answer()]},
         [":1, message 2", "does not write a tool call"]),
        ("{% if %}", ONE, ["is not valid Jinja", "another --chat_template"]),
        ("{{ " + "(" * 9999, ONE, ["is not valid Jinja"]),
        (CHATML, {"system": "Be.", "conversations": [{"from": "human", "value": "<s>"}, {"from": "gpt", "value": "a"}]},
         [":1, message 1: the text contains '<s>'"]),
        (CHATML, {"system": "<s>", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         [":1, field 'system': the text contains '<s>'"]),
        (CHATML, {"messages": [user("a <|im_end|> b"), answer()]}, ["message 1", "'<|im_end|>'", "plain", "control"]),
        (TOOLS, {**ONE, "tools": [{"name": "<|im_start|>"}]}, ["'tools'", "'<|im_start|>'"]),
        ("{{ 1 / 0 }}", ONE, ["rejects these messages", "division"]),
        ("{{ raise_exception('no') }}", ONE, ["rejects these messages (no)"]),
        (THINKING.replace("m.content +", "m.content.split('</think>')[-1] +"),
         {"messages": [user(), answer("<think>a</think>b"), user(), answer()]},
         ["writes message 2", "differently when more turns follow", "--train_on last_turn", "{% generation %}"]),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_one_line(
    tmp_path: Path, tokenizer: Any, template: str, row: Row, words: list[str]
) -> None:
    tokenizer.chat_template = template
    message = said(tmp_path, [row], tokenizer=tokenizer)
    assert all(word in message for word in words), message


def test_a_template_that_forgets_thoughts_can_train_the_last_turn(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING.replace("m.content +", "m.content.split('</think>')[-1] +")
    row = {"messages": [user(), answer("<think>a</think>b"), user(), answer()]}
    example = read_one(tmp_path, row, tokenizer=tokenizer, reading=Reading(train_on="last_turn"))
    assert "a</think>b" not in example.prompt and "b<|im_end|>" in example.prompt


# Control tokens ---------------------------------------------------------------------------------------------


def ids(tokenizer: Any, path: str, meaning: Any) -> list[int]:
    reading = Reading(special_tokens=meaning)
    (example,) = custom(path, tokenizer=tokenizer, reading=reading)
    tokens: list[int] = encode_dataset([example], tokenizer, max_length=300, reading=reading).tokens.tolist()
    assert tokenizer.decode(tokens).count("<|im_end|>") >= example.prompt.count("<|im_end|>")
    return tokens


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a <|im_end|> b"), answer()]},
        {"prompt": "a <|im_end|> b", "completion": "Yo"},
        {"prompt": "a", "completion": "Yo <|im_end|> b"},
        {"text": "a <|im_end|> b"},
    ],
)
def test_control_tokens_in_a_row_are_rejected_text_or_tokens(tmp_path: Path, tokenizer: Any, row: Row) -> None:
    path = write_rows(tmp_path / "data.jsonl", [row])
    message = refusal(lambda: custom(path, tokenizer=tokenizer))
    assert f"{path}:1" in message and "'<|im_end|>', a control token of the tokenizer" in message
    plain, control = (ids(tokenizer, path, meaning) for meaning in ("plain", "control"))
    end = tokenizer.eos_token_id
    assert control.count(end) == plain.count(end) + 1
    assert tokenizer.decode(plain) == tokenizer.decode(control)
    assert len(custom(path)) == 1  # without a tokenizer nothing is known of them


def test_an_unknown_role_may_be_written_as_it_stands(tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": [user(), {"role": "<|im_end|>", "content": "x"}, answer()]}
    found = ids(tokenizer, write_rows(tmp_path / "data.jsonl", [row]), "plain")
    assert found.count(tokenizer.eos_token_id) == 3  # the ends of three turns
    row["messages"][1]["role"] = "critic"
    example = read_one(tmp_path, row, reading=Reading(special_tokens="plain"))
    assert example.prompt == "User: Hi\nCritic: x\nAssistant:"


def test_a_template_that_writes_calls_may_write_every_role_alike(tmp_path: Path, tokenizer: Any) -> None:
    text = "(m.tool_calls[0].function.name if m.tool_calls else m.content)"
    tokenizer.chat_template = CHATML.replace("m.content", text)
    called = answer("", tool_calls=[{"name": "add"}])
    row = {"messages": [user(), called, {"role": "tool", "content": "3"}, answer()]}
    assert "<|im_start|>tool\n3<|im_end|>" in read_one(tmp_path, row, tokenizer=tokenizer).prompt
    row["messages"][2]["role"] = "critic"
    assert ":1, message 3: role 'critic' is not known" in said(tmp_path, [row], tokenizer=tokenizer)


def test_a_prompt_template_may_write_control_tokens(tmp_path: Path, tokenizer: Any) -> None:
    template = "<|im_start|>{prompt}<|im_end|>"
    example = read_one(tmp_path, PLAIN, tokenizer=tokenizer, reading=Reading(template=template))
    assert encode_dataset([example], tokenizer, max_length=99).tokens.tolist().count(tokenizer.eos_token_id) == 2


# Templates of the user --------------------------------------------------------------------------------------


def test_a_prompt_template_and_a_chat(tmp_path: Path, tokenizer: Any) -> None:
    row, reading = {"messages": [user(), answer("one"), user(), answer("two")]}, Reading(template="Chat: {prompt}")
    assert "--train_on last_turn" in said(tmp_path, [row], tokenizer=tokenizer, reading=reading)
    example = read_one(tmp_path, row, tokenizer=tokenizer, reading=replace(reading, train_on="last_turn"))
    assert example.prompt.startswith("Chat: <|im_start|>user\nHi") and example.completion == "two"


def test_a_chat_template_of_the_user(tmp_path: Path, tokenizer: Any) -> None:
    mine = write(tmp_path / "mine.jinja", "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer.chat_template, reading = read_chat_template(mine), Reading(chat_template=mine)
    example = read_one(tmp_path, ONE, tokenizer=tokenizer, reading=reading)
    assert [segment.text for segment in example.segments] == ["[Hi]", "[Yo]"] and example.conversation is not None
    assert f"{tmp_path}/mine.jinja; every answer is supervised, found by comparing" in chat_note(tokenizer, reading)
    tokenizer.chat_template = None
    note = chat_note(tokenizer, Reading(train_on="last_turn"))
    assert note.startswith("the plain format with User: and Assistant:") and "the last answer" in note
    for content, words in ((None, "no such file"), (b"", "is empty"), (b"\xff", "not UTF-8")):
        file = tmp_path / "other.jinja"
        if content is not None:
            write(file, content)
        assert words in refusal(lambda file=file: read_chat_template(file))


# Columns under our names ------------------------------------------------------------------------------------


def renamed(tmp_path: Path, row: Row, columns: str, *, template: str | None = None, **options: Any) -> Example:
    """The example of one row with --columns."""
    return read_one(tmp_path, row, reading=Reading(columns=parse_columns(columns), template=template), **options)


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
        ({**ONE, **PLAIN}, "messages=messages", "User: Hi\nAssistant:", "Yo"),
        ({**ONE, **PLAIN, "system": "Be."}, "prompt=prompt,completion=completion", "a", " b"),
        ({"query": "Hi", "response": "Yo", "label": 3}, "prompt=query,completion=response", "Hi", " Yo"),
        # Names change places, and a field with nothing in it has no name that counts.
        (PLAIN, "prompt=completion,completion=prompt", "b", " a"),
        ({"q": "Hi", "completion": "Yo", "prompt": None, "history": []}, "prompt=q", "Hi", " Yo"),
    ],
)  # fmt: skip
def test_columns_rename_fields(tmp_path: Path, row: Row, columns: str, prompt: str, answer: str) -> None:
    example = renamed(tmp_path, row, columns)
    assert (example.prompt, example.completion) == (prompt, answer)


def test_the_input_and_references_of_a_row_are_read_under_either_name(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "references": ["three"]}
    other = {"task": "Add.", "context": "1 2", "result": "3", "more": ["three"]}
    found = renamed(tmp_path, row, "output=output")
    assert "### Input:\n1 2\n" in found.prompt and found.references == ("3", "three")
    for given, columns in (
        ({**row, "task": "Add.", "instruction": None}, "instruction=task"),
        (other, "instruction=task,input=context,output=result,references=more"),
    ):
        assert renamed(tmp_path, given, columns).prompt == found.prompt
        assert renamed(tmp_path, given, columns).references == found.references


def test_the_tools_of_a_chat_are_read_under_either_name(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template, turns = TOOLS, ONE["messages"]
    for row, columns in (
        ({"dialog": turns, "tools": [{"name": "add"}]}, "messages=dialog"),
        ({"messages": turns, "apis": [{"name": "add"}]}, "tools=apis"),
        ({"dialog": turns, "apis": [{"name": "add"}]}, "messages=dialog,functions=apis"),
    ):
        assert '"name": "add"' in renamed(tmp_path, row, columns, tokenizer=tokenizer).prompt


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        (PLAIN, "prompt=q", [":1: --columns prompt=q: the row has no field 'q'", "'prompt', 'completion'", "null"]),
        (PLAIN, "promt=prompt", ["the task has no field 'promt' (did you mean prompt?)"]),
        ({"question": "x", "response": "y"}, "question=query", ["has no field 'question'", "mean query=question?"]),
        ({**PLAIN, "q": "x"}, "prompt=q", [":1: --columns prompt=q: the row also has a field 'prompt' ('a'", "rename"]),
        ({**PLAIN, "sys": "x"}, "system=sys", ["--columns system=sys", "prompt/completion have no field 'system'"]),
        ({**PLAIN, **ONE, "t": []}, "tools=t",
         ["two shapes", "--columns tools=t,messages=messages or", "--columns tools=t,prompt=prompt,completion="]),
        ({**PLAIN, **ONE}, "prompt=prompt", ["'messages' looks like data", "completion=completion"]),
        ({"q": "x", "label": 1}, "query=q", ["'label', 'query' (as named by --columns)"]),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(tmp_path: Path, row: Row, columns: str, words: list[str]) -> None:
    message = refusal(lambda: renamed(tmp_path, row, columns))
    assert all(word in message for word in words), message


def test_columns_of_a_task_and_of_a_prompt_template(tmp_path: Path) -> None:
    row = {"q": "Hi", "a": "Yo", "level": "easy"}
    assert renamed(tmp_path, row, "prompt=q,completion=a", template="{level} {prompt}").prompt == "easy Hi"
    squad = [{"passage": "C.", "question": "Q?", "answers": {"text": ["x"]}}]
    path, reading = write_rows(tmp_path / "squad.jsonl", squad), Reading(columns={"context": "passage"})
    (example,) = load_split("squad", "test", files={"test": path}, seed=0, reading=reading)
    assert example.prompt == "Context: C. Question: Q? Answer:"
    write_rows(tmp_path / "squad.jsonl", [{**squad[0], "context": "Other."}])
    message = refusal(lambda: load_split("squad", "test", files={"test": path}, seed=0, reading=reading))
    assert "the row also has a field 'context' ('Other.')" in message


@pytest.mark.parametrize("given", ["prompt", "prompt=", "=x", "prompt=a,prompt=b", ""])
def test_a_value_of_another_form(given: str) -> None:
    values = {"task": "custom", "train_file": "a.jsonl", "columns": given}
    assert "--columns" in refusal(lambda: make_settings(values))
