"""Where answers stand in a rendered chat, if the start of an answer holds more than a past answer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_tiedlora.data.rendering import render_with_spans


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
