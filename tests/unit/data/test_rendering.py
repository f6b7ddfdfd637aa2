"""The spans of answers in a rendered chat, of templates that write a last turn in another way than an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from zoo_oracle import write_zoo_tokenizer

from megatron_tiedlora.data.chat_template import TurnsChange, render_with_spans
from megatron_tiedlora.data.tokenizer import load_tokenizer


class OpensThoughts:
    """A template that starts an answer with an open thought, and writes past answers without one."""

    def get_chat_template(self, **_: Any) -> str:
        return "written in Python below"

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        assert not tokenize
        turns = [
            f"<A>{message['content']}<eos>" if message["role"] == "assistant" else f"<U>{message['content']}"
            for message in messages
        ]
        return "".join(turns) + ("<A><think>\n" if add_generation_prompt else "")


@pytest.mark.parametrize("text", ["<html>hi</html>", "<table>", "<think>\nno", "plain", "<A>", "<"])
def test_an_answer_that_begins_like_the_open_thought(text: str) -> None:
    """What both have in common is a part of the answer."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text},
                {"role": "user", "content": "<html>"}, {"role": "assistant", "content": text}]  # fmt: skip
    found = render_with_spans(OpensThoughts(), messages, None, [1, 3])
    expected = f"{text}<eos>" if not text.startswith("<think>\n") else "no<eos>"
    assert [found.text[start:end] for start, end in found.answers] == [expected, expected]


# As Phi-3's template: an end-of-sequence token after the whole, whoever spoke last.
ENDED = (
    "{% for m in messages %}{{ '<' + m.role + '>'  + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
)
# As TRL's for training: this token is marked too.
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% elif messages[-1].role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)
# A thought and a text marked apart, with something between them that is not: the renderings are compared.
APART = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ 'hm' }}"
    "{% endgeneration %}:{% generation %}{{ m.content }}{% endgeneration %}{{ '<end>' }}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A thought before the last answer only.
THOUGHT = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "two"}]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDED, ["one<end>", "two<end><|im_end|>"]),
        (MARKED, ["one", "two<|im_end|>"]),
        (APART, ["hm:one<end>", "hm:two<end>"]),
        (THOUGHT, ["one<end>", "<think></think>two<end>"]),
    ],
)
def test_the_end_of_the_whole_is_no_part_of_an_earlier_answer(
    template: str, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path, template=template))
    found = render_with_spans(tokenizer, CHAT, None, [1, 3])
    assert [found.text[start:end] for start, end in found.answers] == expected
    (last,) = render_with_spans(tokenizer, CHAT, None, [3]).answers
    assert last == found.answers[-1]


def test_a_thought_that_is_left_out_of_earlier_turns_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path, template=THOUGHT))
    thinks = [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}, *CHAT[2:]]
    with pytest.raises(TurnsChange, match=r"writes the second turn \('one'\) in another way"):
        render_with_spans(tokenizer, thinks, None, [1], names=["the first turn", "the second turn", "", ""])
    assert len(render_with_spans(tokenizer, thinks, None, [3]).answers) == 1
