"""The data zoo: rows of every shape give the ids and labels that an independent oracle computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import family_templates as families
from support.task_files import refusal, write_rows
from support.zoo_oracle import (
    CHATML,
    LLAMA2,
    MARKED,
    THINKING,
    TOOLS,
    Sample,
    ZooOracle,
    answer,
    user,
    write_zoo_tokenizer,
)

from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tokenizer import load_tokenizer

Row = dict[str, Any]


SYSTEM: Row = {"role": "system", "content": "Be brief."}
ONE = [user("Hello."), answer("How are you?")]
THREE = [SYSTEM, *ONE, user("What is 2 + 2?"), answer("It is 4."), user("thanks"), answer("fine.")]
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALLED = [user("Add 1 and 2."), answer("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, answer("It is 3.")]
RESULT: Row = {"role": "tool", "content": "3"}
OBSERVED = [user("Add 1 and 2."), answer("add"), {**RESULT, "role": "observation"}, answer("It is 3.")]
FUNCTIONS: Row = {**SYSTEM, "functions": "[add]"}
CALLS: Row = {"role": "assistant", "content": None, "function_calls": "add(1, 2)"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)


@dataclass(frozen=True)
class Animal:
    """A row, and what the oracle says of it."""

    row: Row
    expected: Callable[[ZooOracle], Sample]
    template: str | None = CHATML
    reading: Reading = field(default_factory=Reading)
    bos: bool = False


def chat(messages: list[Row], **more: Any) -> Callable[[ZooOracle], Sample]:
    return lambda oracle: oracle.chat(messages, **more)


def plain(prompt: str, completion: str) -> Callable[[ZooOracle], Sample]:
    return lambda oracle: oracle.plain(prompt, completion)


def flagged(*flags: Row, learned: list[int], template: str = CHATML) -> Animal:
    """A chat of one exchange for each answer's flags, which decide on `learned` and leave no trace in the text."""
    pairs = list(zip(THREE[1::2], THREE[2::2], flags, strict=False))
    messages = [turn for question, said, more in pairs for turn in (question, {**said, **more})]
    bare = [turn for question, said, _ in pairs for turn in (question, said)]
    return Animal({"messages": messages}, chat(bare, learned=learned), template)


SHAREGPT = [
    {"from": "human", "value": "Hello."},
    {"from": "gpt", "value": "How are you?"},
    {"from": "human", "value": "thanks"},
    {"from": "gpt", "value": "fine."},
]
SAME_AS_SHAREGPT = [*ONE, user("thanks"), answer("fine.")]
PARTS = [user([{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]), answer("It is 4.")]
OPENAI_CALL = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}

ZOO = {
    "messages, one turn": Animal({"messages": ONE}, chat(ONE)),
    "messages, three turns": Animal({"messages": THREE}, chat(THREE)),
    "messages, the tokenizer adds BOS": Animal({"messages": THREE}, chat(THREE), bos=True),
    "messages, metadata beside them": Animal({"messages": ONE, "id": 7, "source": "x", "system": None}, chat(ONE)),
    "messages, the last turn": Animal(
        {"messages": THREE}, chat(THREE, learned=[6]), reading=Reading(train_on="last_turn")
    ),
    "messages, generation marks": Animal({"messages": THREE}, chat(THREE), template=MARKED),
    "messages, marks and train": flagged({}, {"train": False}, {}, learned=[1, 5], template=MARKED),
    "messages, train": flagged({"train": False}, {"train": True}, learned=[3]),
    "messages, weight": flagged({"weight": 1}, {"weight": 0}, learned=[1]),
    "messages, loss": flagged({"loss": False}, {"loss": None}, learned=[3]),
    "messages, content parts": Animal({"messages": PARTS}, chat([user("What is\n2 + 2?"), answer("It is 4.")])),
    "messages, a template with BOS": Animal(
        {"messages": SAME_AS_SHAREGPT}, chat(SAME_AS_SHAREGPT), template=LLAMA2, bos=True
    ),
    "messages, a last answer with a thought": Animal({"messages": ONE}, chat(ONE), template=THINKING),
    "tools and calls": Animal({"messages": CALLED, "tools": [SCHEMA]}, chat(CALLED, tools=[SCHEMA]), template=TOOLS),
    "tools as a text": Animal(
        {"messages": CALLED, "tools": json.dumps([SCHEMA])}, chat(CALLED, tools=[SCHEMA]), template=TOOLS
    ),
    "functions of OpenAI": Animal(
        {
            "messages": [CALLED[0], OPENAI_CALL, {"role": "function", "name": "add", "content": "3"}, CALLED[3]],
            "functions": [SCHEMA["function"]],
        },
        chat(CALLED, tools=[SCHEMA]),
        template=TOOLS,
    ),
    "ShareGPT": Animal({"conversations": SHAREGPT}, chat(SAME_AS_SHAREGPT)),
    "ShareGPT, system": Animal({"conversations": SHAREGPT, "system": "Be brief."}, chat([SYSTEM, *SAME_AS_SHAREGPT])),
    "ShareGPT, a call": Animal(
        {
            "conversations": [
                {"from": "human", "value": "Add 1 and 2."},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3."},
            ],
            "tools": json.dumps([SCHEMA["function"]]),
        },
        chat(CALLED, tools=[SCHEMA]),
        template=TOOLS,
    ),
    "prompt and completion of turns": Animal({"prompt": THREE[:6], "completion": THREE[6:]}, chat(THREE, learned=[6])),
    "prompt and completion of turns, marks": Animal(
        {"prompt": [user("Hello.")], "completion": [answer("fine.")]},
        chat([user("Hello."), answer("fine.")]),
        template=MARKED,
    ),
    "prompt and completion": Animal({"prompt": "Question:", "completion": " 4"}, plain("Question:", " 4")),
    "prompt and completion, BOS": Animal(
        {"prompt": "Question:", "completion": "4"}, plain("Question:", " 4"), bos=True
    ),
    "input and output": Animal({"input": "Hello.\n", "output": "fine"}, plain("Hello.\n", "fine")),
    "query and response": Animal({"query": "Hello.", "response": "How are you?"}, chat(ONE)),
    "query and response, history": Animal(
        {"query": "thanks", "response": "fine.", "system": "Be brief.", "history": [["Hello.", "How are you?"]]},
        chat([SYSTEM, *SAME_AS_SHAREGPT]),
    ),
    "query and response, named": Animal(
        {"query": "Question:", "response": "4", "text": "unread"},
        plain("Question:", " 4"),
        reading=Reading(columns={"prompt": "query", "completion": "response"}),
    ),
    "text": Animal({"text": "Once upon a time."}, lambda oracle: oracle.text("Once upon a time.")),
    "text, BOS": Animal({"text": "Once upon a time."}, lambda oracle: oracle.text("Once upon a time."), bos=True),
    "alpaca": Animal({"instruction": "Say hello.", "output": "Hello."}, plain(ALPACA, " Hello.")),
    "alpaca, input": Animal({"instruction": "Add.", "input": "1 2", "output": "3"}, plain(ALPACA_INPUT, " 3")),
    "alpaca, system and history": Animal(
        {
            "instruction": "thanks",
            "input": "",
            "output": "fine.",
            "system": "Be brief.",
            "history": [["Hello.", "How are you?"]],
        },
        chat([SYSTEM, *SAME_AS_SHAREGPT]),
    ),
    "alpaca, empty history": Animal(
        {"instruction": "What is", "input": "2 + 2?", "output": "It is 4.", "history": []},
        chat([user("What is\n2 + 2?"), answer("It is 4.")]),
    ),
    "Gemma 2": Animal({"messages": SAME_AS_SHAREGPT}, chat(SAME_AS_SHAREGPT), families.GEMMA2, bos=True),
    "Gemma 3": Animal({"messages": THREE}, chat(THREE), families.GEMMA3, bos=True),
    "Gemma 3, content parts": Animal(
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in THREE]},
        chat(THREE),
        families.GEMMA3,
        bos=True,
    ),
    "GLM-4": Animal({"messages": THREE}, chat(THREE), families.GLM4, bos=True),
    "GLM-4, an observation": Animal({"messages": OBSERVED}, chat(OBSERVED), families.GLM4),
    "GLM-4, a tool": Animal({"messages": [*OBSERVED[:2], RESULT, OBSERVED[3]]}, chat(OBSERVED), families.GLM4),
    "Granite": Animal({"messages": THREE}, chat(THREE), families.GRANITE),
    "Granite, no system turn": Animal({"messages": ONE}, chat(ONE), families.GRANITE),
    "Granite, tools and calls": Animal(
        {"messages": CALLED, "tools": [SCHEMA]}, chat(CALLED, tools=[SCHEMA]), families.GRANITE
    ),
    "Mistral Small": Animal({"messages": THREE}, chat(THREE), families.MISTRAL_SMALL, bos=True),
    "OLMo 2": Animal({"messages": THREE}, chat(THREE), families.OLMO2, bos=True),
    "OLMo 3": Animal({"messages": ONE}, chat(ONE), families.OLMO3),
    "OLMo 3, functions": Animal(
        {"messages": [FUNCTIONS, ONE[0], CALLS, RESULT, answer("It is 3.")]},
        chat(
            [FUNCTIONS, ONE[0], {**CALLS, "content": ""}, {**RESULT, "role": "environment"}, answer("It is 3.")],
            learned=[4],
        ),
        families.OLMO3,
        Reading(train_on="last_turn"),
    ),
    "no template": Animal({"messages": THREE}, lambda oracle: oracle.lines(THREE), template=None),
    "no template, BOS": Animal({"messages": THREE}, lambda oracle: oracle.lines(THREE), template=None, bos=True),
}


class Cage:
    """Tokenizer and oracle of an animal."""

    def __init__(self, folder: Path, *, template: str | None = CHATML, bos: bool = False) -> None:
        write_zoo_tokenizer(folder, template=template, bos=bos)
        self.tokenizer = load_tokenizer(folder)
        self.oracle = ZooOracle(folder, template=template, bos=bos)

    def samples(self, given: str, *, reading: Reading | None = None, max_length: int = 400) -> list[Sample]:
        files = {"train": given, "validation": given}
        examples = load_split("custom", "train", files=files, seed=0, tokenizer=self.tokenizer, reading=reading)
        found = encode_dataset(examples, self.tokenizer, max_length=max_length, reading=reading)
        return [Sample(found.sample(i).tolist(), found.supervised_of(i).tolist()) for i in range(len(found))]


@pytest.mark.parametrize("name", ZOO)
def test_a_row_gives_the_oracle_s_ids_and_labels(name: str, tmp_path: Path) -> None:
    animal = ZOO[name]
    cage = Cage(tmp_path / "tokenizer", template=animal.template, bos=animal.bos)
    expected = animal.expected(cage.oracle)
    (found,) = cage.samples(write_rows(tmp_path / "rows.jsonl", [animal.row]), reading=animal.reading)
    assert found.ids == expected.ids and found.learned == expected.learned
    assert (any(expected.learned) and not all(expected.learned[1:])) or "text" in animal.row


# Lengths ----------------------------------------------------------------------------------------------------


def test_a_long_chat_loses_whole_early_turns(tmp_path: Path) -> None:
    cage = Cage(tmp_path / "tokenizer")
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": THREE}, {"messages": ONE}])
    left = [SYSTEM, *THREE[3:]], [SYSTEM, *THREE[5:]]
    whole, shorter, shortest = (cage.oracle.chat(messages) for messages in (THREE, *left))
    for room, expected in ((len(whole.ids), whole), (len(whole.ids) - 1, shorter), (len(shortest.ids), shortest)):
        assert cage.samples(file, max_length=room) == [expected, cage.oracle.chat(ONE)]
    examples = load_split(
        "custom", "train", files={"train": file, "validation": file}, seed=0, tokenizer=cage.tokenizer
    )
    dataset = encode_dataset(examples, cage.tokenizer, max_length=len(shortest.ids))
    assert (dataset.shortened_chats, dataset.lost_turns, dataset.truncated_prompts) == (1, 4, 0)
    assert dataset.prompt_lengths is not None  # one answer is left in each
    assert encode_dataset(examples, cage.tokenizer, max_length=400).prompt_lengths is None
    # The last question loses its middle, as any prompt does; the answer stays.
    (cut, _) = cage.samples(file, max_length=len(shortest.ids) - 3)
    assert len(cut.ids) == len(shortest.ids) - 3 and sum(cut.learned) == sum(shortest.learned)
    message = refusal(lambda: cage.samples(file, max_length=sum(shortest.learned)))
    assert message.startswith(f"{file}:1: the answer of {sum(shortest.learned)} tokens")


def test_a_long_text_becomes_several_samples(tmp_path: Path) -> None:
    cage = Cage(tmp_path / "tokenizer", bos=True)
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Once upon a time. " * 9}])
    whole = cage.oracle.text("Once upon a time. " * 9)
    for length in (8, 9, 10, 11, len(whole.ids) - 1):
        found = cage.samples(file, max_length=length)
        assert [token for sample in found for token in sample.ids] == whole.ids
        assert all(sample.learned == [False, *(True for _ in sample.ids[1:])] for sample in found)
        assert all(2 <= len(sample.ids) <= length for sample in found)


def test_where_the_joint_ids_merge_over_the_border_the_text_and_its_span_are_the_same(tmp_path: Path) -> None:
    """An answer that starts with a line break after a head that ends with one: prompts stay as a server sees them."""
    cage, messages = Cage(tmp_path / "tokenizer"), [user("Hello."), answer("\n\nfine.")]
    (found,) = cage.samples(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]))
    joint = cage.oracle.chat(messages)
    assert found.ids != joint.ids
    decode = cage.oracle.backend.decode
    assert decode(found.ids, skip_special_tokens=False) == cage.oracle.whole(messages)
    learned = [token for token, is_label in zip(found.ids, found.learned, strict=True) if is_label]
    (place,) = cage.oracle.places(messages, [1])
    assert decode(learned, skip_special_tokens=False) == cage.oracle.whole(messages)[slice(*place)]
    prompt = cage.oracle.render(messages[:1], starts=True)
    assert found.ids[: found.learned.index(True)] == cage.oracle.ids(prompt)
