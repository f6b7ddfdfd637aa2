"""The shapes of your own rows: one table that says which fields a shape has, and how they become turns or texts.

Owns the table, which shape a row has, --columns, and the rejection of fields that look like data and are not read.
Leaves turns to `turns`, and their text to `chat`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import nearest_name
from megatron_tiedlora.data.fields import checked_text, describe_fields, required_text
from megatron_tiedlora.data.turns import ASSISTANT, USER, Conversation, make_conversation, read_messages

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """What a row holds: a prompt and its answer, a text without a prompt (prompt ''), or a conversation."""

    prompt: str = ""
    answer: str = ""
    conversation: Conversation | None = None


@dataclass(frozen=True)
class Shape:
    """One shape of rows.

    name: for messages and documents.
    needs: the fields by which it is recognised.
    read: (row, source) -> what the row holds.
    may: further fields that it reads.
    answer_fields: the fields with the answer, which a prompt template must not see.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields, str], Content]
    answer_fields: tuple[str, ...]
    may: tuple[str, ...] = field(default=())

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that it reads."""
        return (*self.needs, *self.may)


# Readers ----------------------------------------------------------------------------------------------------


def _messages(row: Fields, source: str) -> Content:
    tools = row.get("tools") or row.get("functions")
    return Content(conversation=read_messages(row["messages"], "messages", source, tools=tools))


def _sharegpt(row: Fields, source: str) -> Content:
    turns = row["conversations"]
    system = _optional_text(row, "system", source)
    if system and isinstance(turns, list | tuple):
        turns = [{"role": "system", "content": system}, *turns]
    return Content(conversation=read_messages(turns, "conversations", source, tools=row.get("tools")))


def _prompt_completion(row: Fields, source: str) -> Content:
    prompt, completion = row["prompt"], row["completion"]
    lists = [isinstance(value, list | tuple) for value in (prompt, completion)]
    if not any(lists):
        if row.get("tools"):
            raise UserError(f"{source}: field 'tools' needs 'prompt' and 'completion' to be lists of messages")
        return Content(required_text(row, "prompt", source), required_text(row, "completion", source))
    if not all(lists):
        raise UserError(f"{source}: one of 'prompt' and 'completion' is a list of messages, the other is not")
    whole = read_messages([*prompt, *completion], "prompt", source, tools=row.get("tools"))
    trained = (*(False for _ in prompt), *whole.trained[len(prompt) :])
    if not any(trained):
        raise UserError(f"{source}: field 'completion' has no turn of the assistant to train on; correct the row")
    return Content(conversation=replace(whole, trained=trained))


def _query_response(row: Fields, source: str) -> Content:
    return _turns_of(row, required_text(row, "query", source), required_text(row, "response", source), source)


def _input_output(row: Fields, source: str) -> Content:
    return Content(required_text(row, "input", source), required_text(row, "output", source))


_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def _alpaca(row: Fields, source: str) -> Content:
    """Alpaca's own prompt; with the field `system` or `history`, even an empty one, turns of a chat."""
    instruction, answer = required_text(row, "instruction", source), required_text(row, "output", source)
    context = _optional_text(row, "input", source)
    if row.get("system") is not None or row.get("history") is not None:
        return _turns_of(row, f"{instruction}\n{context}" if context.strip() else instruction, answer, source)
    template = _ALPACA_INPUT if context.strip() else _ALPACA
    return Content(template.format(instruction=instruction, input=context), answer)


def _text(row: Fields, source: str) -> Content:
    return Content(answer=required_text(row, "text", source))


def _turns_of(row: Fields, question: str, answer: str, source: str) -> Content:
    """The turns of a question with its answer, after the turns of `system` and `history`."""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise UserError(f"{source}: field 'history' is not a list of [question, answer] pairs; correct the row")
    system = _optional_text(row, "system", source)
    messages = [{"role": "system", "content": system}] if system else []
    for pair in [*history, (question, answer)]:
        for role, text in zip((USER, ASSISTANT), pair, strict=True):
            messages.append({"role": role, "content": checked_text(text, "history", source)})
    trained = [message["role"] == ASSISTANT for message in messages]
    return Content(conversation=make_conversation(messages, trained, source, tools=row.get("tools")))


def _optional_text(row: Fields, name: str, source: str) -> str:
    value = row.get(name)
    return "" if value is None else checked_text(value, name, source, allow_empty=True)


# The table --------------------------------------------------------------------------------------------------

SHAPES = (
    Shape("messages", ("messages",), _messages, ("messages",), may=("tools", "functions")),
    Shape("ShareGPT", ("conversations",), _sharegpt, ("conversations",), may=("system", "tools")),
    Shape("prompt/completion", ("prompt", "completion"), _prompt_completion, ("completion",), may=("tools",)),
    Shape("query/response", ("query", "response"), _query_response, ("response",), may=("system", "history", "tools")),
    Shape("alpaca", ("instruction", "output"), _alpaca, ("output",), may=("input", "system", "history")),
    Shape("input/output", ("input", "output"), _input_output, ("output",)),
    Shape("text", ("text",), _text, ("text",)),
)
REFERENCES = "references"  # more accepted answers, in a row of any shape
OUR_FIELDS = frozenset((*(name for shape in SHAPES for name in shape.fields), REFERENCES))
# Names of fields that hold data in other tools' formats. A row that has one, and is not read for it, is rejected.
_LOOKS_LIKE_DATA = OUR_FIELDS | {
    *("question", "answer", "answers", "context", "target", "targets", "label", "labels", "choices", "options"),
    *("chosen", "rejected", "rejected_response", "rejected_messages", "solution", "reasoning", "rationale", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos", "documents", "objects", "summary", "translation"),
    *("prefix", "suffix", "system_prompt", "conversation", "dialogue", "chat", "turns", "chat_template_kwargs"),
}


def shape_names() -> str:
    """The shapes with their fields, for messages."""
    listed = ["{" + ", ".join(f'"{name}"' for name in shape.needs) + "}" for shape in SHAPES]
    return f"{', '.join(listed[:-1])} or {listed[-1]}"


def find_shape(row: Fields, source: str, *, named: Collection[str] = (), strict: bool = True) -> Shape:
    """The shape of a row.

    Args:
        named: fields that the user's prompt template reads.
        strict: whether a second shape, or a field that looks like data, is an error.

    Raises:
        UserError: it has no shape, several, or a field that looks like data and would not be read.
    """
    found = [shape for shape in SHAPES if all(row.get(name) is not None for name in shape.needs)]
    found = found or [shape for shape in SHAPES if all(name in row for name in shape.needs)]  # one is null
    if not found:
        raise UserError(
            f"{source}: the row has {describe_fields(row)}; expected {shape_names()}. Name your fields with"
            " --columns OURS=YOURS[,...]"
        )
    shape = found[0]
    if not strict:
        return shape
    if others := [other for other in found[1:] if not set(other.needs) <= set(shape.fields)]:
        raise UserError(
            f"{source}: the row has the fields of two shapes, {shape.name} and {others[0].name}; choose one, e.g."
            f" --columns {','.join(f'{name}={name}' for name in shape.needs)}"
        )
    for name, value in row.items():
        unread = name in _LOOKS_LIKE_DATA and name not in (*shape.fields, REFERENCES) and name not in named
        if unread and value not in (None, "", [], {}):
            raise UserError(
                f"{source}: field {name!r} looks like data, but rows of shape {shape.name} are read without it; name"
                f" the fields to read with --columns {','.join(f'{name}={name}' for name in shape.needs)}"
            )
    return shape


def renamed(row: Fields, columns: Mapping[str, str], source: str, *, known: Collection[str]) -> dict[str, Any]:
    """The row with the fields that --columns names under our names.

    Args:
        known: our fields, of which the row keeps those that --columns names, and none that looks like data. Empty for
            a task with fields of its own: any name is accepted, and the row keeps its other fields.

    Raises:
        UserError: the row lacks a field, or a name of ours is unknown.
    """
    for ours, theirs in columns.items():
        if known and ours not in known:
            raise UserError(
                f"--columns {ours}={theirs}: {ours!r} is not a field of ours{nearest_name(ours, known)}; they are"
                f" {', '.join(sorted(known))}"
            )
        if theirs not in row:
            raise UserError(
                f"{source}: --columns {ours}={theirs}: there is no field {theirs!r}; the row has {describe_fields(row)}"
            )
    others = {name: value for name, value in row.items() if not known or name not in _LOOKS_LIKE_DATA}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items()}}
