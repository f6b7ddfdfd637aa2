"""Your own rows, in four shapes. The shape is recognised for each row.

Owns how a shape becomes a prompt and an answer. The tokenizer's chat template renders the turns of a conversation;
without one they become `Role: content` lines. A row of any shape may list more accepted answers in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.chat_template import ChatTemplate
from megatron_tiedlora.data.fields import checked_text, describe_fields, required_text, required_texts, without
from megatron_tiedlora.data.task import Parts, Task

SHAPES = '{"prompt","completion"}, {"input","output"}, {"instruction","input","output"} or {"messages"}'

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def _parts(row: Mapping[str, Any], source: str, chat: ChatTemplate | None) -> Parts:
    """A template may use the row's fields without the answers, and `prompt`, which is the default prompt.

    Raises UserError naming the source with its fields and the shapes, or the field that is empty.
    """
    if "messages" in row:
        prompt, answer = _from_messages(row["messages"], source, chat)
        answer_field = "messages"
    elif "instruction" in row and "output" in row:
        prompt, answer = _from_alpaca(row, source)
        answer_field = "output"
    elif "prompt" in row and "completion" in row:
        prompt, answer = required_text(row, "prompt", source), required_text(row, "completion", source)
        answer_field = "completion"
    elif "input" in row and "output" in row:
        prompt, answer = required_text(row, "input", source), required_text(row, "output", source)
        answer_field = "output"
    else:
        raise UserError(f"{source}: the row has {describe_fields(row)}; expected {SHAPES}")
    references = row.get("references")
    more = () if references is None else required_texts(references, "references", source)
    return Parts({**without(row, answer_field, "references"), "prompt": prompt}, prompt, (answer, *more))


def _from_alpaca(row: Mapping[str, Any], source: str) -> tuple[str, str]:
    instruction = required_text(row, "instruction", source)
    answer = required_text(row, "output", source)
    context = row.get("input")
    context = "" if context is None else checked_text(context, "input", source, allow_empty=True)
    template = _ALPACA_INPUT if context.strip() else _ALPACA
    return template.format(instruction=instruction, input=context), answer


def _from_messages(messages: Any, source: str, chat: ChatTemplate | None) -> tuple[str, str]:
    """The last message, which must be the assistant's, is the answer. All messages before it are the prompt."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(f"{source}: field 'messages' is not a list of at least two messages")
    turns: list[dict[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"{source}: message {number} is not an object with 'role' and 'content'")
        where = f"{source}, message {number}"
        turns.append({name: required_text(message, name, where) for name in ("role", "content")})
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{source}: the last message is from {turns[-1]['role']!r}, not from 'assistant'")
    return _render_turns(turns[:-1], source, chat), turns[-1]["content"]


def _render_turns(turns: list[dict[str, str]], source: str, chat: ChatTemplate | None) -> str:
    if chat is not None:
        return chat.render(turns, source)
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n".join([*lines, "Assistant:"])


TASK = Task(name="custom", fields=(), template="", parts=_parts, metrics=("exact_match",))
