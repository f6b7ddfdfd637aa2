"""--data_rules 1: rows give what version 0.1 gave. The expected texts are those of its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_files import HUB_ROWS, refusal, write_rows
from zoo_oracle import write_zoo_tokenizer

from megatron_tiedlora.data.encode import encode_examples
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import load_tokenizer

Row = dict[str, Any]
FIRST = Reading(first_rules=True, train_on="last_turn", add_bos="true", special_tokens="control")
# Writes its own <s>, and what it is given of a turn besides its role and content.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}{{ m.name }}{{ m.tool_calls }}"
    "{% endfor %}"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:"
)


def turn(role: str, text: str = "a", **more: Any) -> Row:
    return {"role": role, "content": text, **more}


def answer(text: str = "d", **more: Any) -> Row:
    return turn("assistant", text, **more)


CHAT = [turn("user"), answer()]
# Rows, and their prompts without a template and by TEMPLATE.
CHATS: list[tuple[Row, str, str]] = [
    ({"messages": [turn("user"), turn("user", "b"), answer()]}, "User: a\nUser: b\nAssistant:", "[user] a[user] b"),
    ({"messages": [answer("a"), answer()]}, "Assistant: a\nAssistant:", "[assistant] a"),
    ({"messages": [turn("user"), turn("system", "b"), answer()]}, "User: a\nSystem: b\nAssistant:",
     "[user] a[system] b"),
    ({"messages": [turn("user"), answer("b", train=True), turn("user", "c"), answer(train=False)]},
     "User: a\nAssistant: b\nUser: c\nAssistant:", "[user] a[assistant] b[user] c"),
    ({"messages": [turn("user"), answer(weight=0.5)]}, "User: a\nAssistant:", "[user] a"),
    ({"messages": [turn("human"), turn("gpt", "b"), turn("function", "c", name="f"), answer()]},
     "Human: a\nGpt: b\nFunction: c\nAssistant:", "[human] a[gpt] b[function] c"),
    ({"messages": [turn("Critic"), answer()]}, "Critic: a\nAssistant:", "[Critic] a"),
    ({"messages": [turn("user", name="Ann", images=["x"]), answer(tool_calls=[{"name": "f"}], thinking="t")]},
     "User: a\nAssistant:", "[user] a"),
    ({"messages": CHAT, "tools": [{"name": "f"}], "functions": "x"}, "User: a\nAssistant:", "[user] a"),
    ({"messages": CHAT, "instruction": "i", "output": "o", "prompt": "p", "completion": "c", "label": 1},
     "User: a\nAssistant:", "[user] a"),
    ({"messages": [turn("user", "<s><|im_end|>"), answer()]}, "User: <s><|im_end|>\nAssistant:",
     "[user] <s><|im_end|>"),
]  # fmt: skip
OTHERS: list[tuple[Row, str, str]] = [
    ({"prompt": "p", "completion": "c", "instruction": "Add.", "input": "1", "output": "d"}, ALPACA_INPUT, " d"),
    ({"input": "i", "output": "o", "prompt": "p", "completion": "d", "images": ["x"]}, "p", " d"),
    ({"instruction": "Add.", "output": "d", "system": "s", "history": [["a", "b"]]}, ALPACA, " d"),
    ({"instruction": "Add.", "input": " \n", "output": "d"}, ALPACA, " d"),
    ({"instruction": "i", "input": "a", "prompt": "p", "completion": " d"}, "p", " d"),
    ({"input": "i\n", "output": "d", "references": ["x", " d "], "text": "t"}, "i\n", "d"),
    ({"prompt": "p ", "completion": "d<|im_end|>"}, "p ", "d<|im_end|>"),
]


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_rows_give_the_texts_and_tokens_of_version_0_1(template: str | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "tokenizer", template=template))
    # In one file, since every row had a shape of its own.
    path = write_rows(tmp_path / "rows.jsonl", [row for row, *_ in (*CHATS, *OTHERS)])
    files = {"train": path, "validation": path}
    examples = load_split("custom", "train", files=files, seed=0, tokenizer=tokenizer, reading=FIRST)
    chats = [(f"<s>{rendered}", " d") if template else (plain, " d") for _, plain, rendered in CHATS]
    expected = [*chats, *((prompt, completion) for _, prompt, completion in OTHERS)]
    assert [example.prompt for example in examples] == [prompt for prompt, _ in expected]
    samples = encode_examples(tokenizer, examples, max_length=300, reading=FIRST)
    for sample, (prompt, completion) in zip(samples, expected, strict=True):
        whole = prompt if prompt.startswith("<s>") else f"<s>{prompt}"
        before, after = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (whole, completion.removesuffix("<|im_end|>"))
        )
        assert sample.tokens.tolist() == [*before, *after, tokenizer.eos_token_id]
        assert sample.supervised.tolist() == [*(False for _ in before), *(True for _ in after), True]


@pytest.mark.parametrize(
    ("template", "prompt"), [(TEMPLATE, "<s>[user] aaaa a aa"), (None, "User: aaaa a aa\nAssistant:")]
)
def test_a_prompt_loses_the_tokens_that_version_0_1_cut(template: str | None, prompt: str, tmp_path: Path) -> None:
    """It put <s> in front of what it cut. An <s> that the template wrote was cut as any other token."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "tokenizer", template=template))
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [turn("user", "aaaa a aa"), answer()]}])
    (example,) = load_split("custom", "test", files={"test": path}, seed=0, tokenizer=tokenizer, reading=FIRST)
    start, ids = ([] if template else [tokenizer.bos_token_id]), tokenizer.encode(prompt, add_special_tokens=False)
    after = [*tokenizer.encode(" d", add_special_tokens=False), tokenizer.eos_token_id]
    for length in range(6, 12):
        (sample,) = encode_examples(tokenizer, [example], max_length=length, reading=FIRST)
        keep = length - len(after) - len(start)
        head = (keep + 1) // 2
        assert sample.tokens.tolist() == [*start, *ids[:head], *ids[len(ids) - (keep - head) :], *after]


def test_a_prompt_template_reads_every_field_but_the_answer(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "output": "d", "system": "Be."}
    path = write_rows(tmp_path / "rows.jsonl", [row, {"messages": CHAT, "system": "x"}])
    options: Any = {"files": {"test": path}, "seed": 0, "prompt_template": "{system}: {prompt}", "reading": FIRST}
    first, second = load_split("custom", "test", **options)
    assert first.prompt == f"Be.: {ALPACA}" and second.prompt == "x: User: a\nAssistant:"
    assert second.completion == " d" and second.references == ("d",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "by --data_rules 1 it needs {'messages'}"),
        ({"messages": None, "prompt": "p", "completion": "c"}, "'messages' is None, not a list"),
        ({"messages": [answer()]}, "not a list of at least two messages"),
        ({"messages": [turn("user"), {"role": "assistant"}]}, "message 2: field 'content' is missing"),
        ({"messages": [turn("user"), turn("gpt")]}, "the last message is from 'gpt'"),
        ({"messages": [turn("user", [{"type": "text", "text": "x"}]), answer()]}, "message 1: field 'content' is [{"),
        ({"messages": ["x", answer()]}, "message 1: is 'x'"),
    ],
)
def test_what_version_0_1_rejected_is_rejected(row: Row, words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    message = refusal(lambda: load_split("custom", "test", files={"test": path}, seed=0, reading=FIRST))
    assert message.startswith(f"{path}:1") and words in message


def test_a_context_of_hellaswag_has_no_white_space_at_its_start(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**HUB_ROWS["hellaswag"], "activity_label": "[x] Roofs"}])
    (example,) = load_split("hellaswag", "test", files={"test": path}, seed=0, reading=FIRST)
    assert example.prompt == "Roofs: A man is sitting on a roof. He"
