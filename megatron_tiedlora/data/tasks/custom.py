"""Defines the task for the user's own rows. A table lists the fields of each row shape and how they are read.

All rows of a file have one shape. A row of any shape may list more accepted answers in `references`.

This module finds the shape of a row in the table, and rejects fields that look like data but are not read. The module
`turns` checks the turns, and the module `chat` converts them to text.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.data import readers
from megatron_tiedlora.data.readers import checked_text, describe_fields, required_text, required_texts, without
from megatron_tiedlora.data.task import Parts, Reading, Task, template_fields
from megatron_tiedlora.data.turns import ASSISTANT, USER, Conversation, Turn, make_conversation, read_turns

Fields = Mapping[str, Any]
Content = tuple[str, str] | list[Turn]
"""The content of a row: a prompt and its answer, an empty prompt and a text, or the turns of a chat."""


@dataclass(frozen=True)
class RowShape:
    """A shape of rows: a set of fields, and how they are read.

    name: the name of the shape in messages and documents.
    needs: the fields that a row of this shape must have. The last is the answer, which a prompt template must not use.
    read: a function (row, source) -> the content of the row.
    may: the optional fields, which are read if a row has them.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields, str], Content]
    may: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Return all fields that are read from rows of this shape."""
        return (*self.needs, *self.may)


# Readers ----------------------------------------------------------------------------------------------------


def _prompt_completion(row: Fields, source: str) -> Content:
    prompt, completion = row["prompt"], row["completion"]
    lists = [isinstance(value, list | tuple) for value in (prompt, completion)]
    if not any(lists):
        if row.get("tools"):
            said = f"{source}: field 'tools' needs 'prompt' and 'completion' to be lists of messages"
            raise UserError(f"{said}, but they are texts; make them lists, or remove 'tools'")
        return required_text(row, "prompt", source), required_text(row, "completion", source)
    if not all(lists):
        one, other = ("prompt", "completion") if lists[0] else ("completion", "prompt")
        said = f"{source}: {one!r} is a list of messages, but {other!r} is {shown(row[other])}"
        raise UserError(f"{said}; give two lists of messages, or two texts")
    before = read_turns(prompt, "prompt", source, prefix="field 'prompt', ") if prompt else []
    after = read_turns(completion, "completion", source, prefix="field 'completion', ")
    return [*(replace(turn, trained=False) for turn in before), *after]


def _query_response(row: Fields, source: str) -> Content:
    texts = [required_text(row, name, source) for name in ("query", "response")]
    turns = [_turn(USER, texts[0], "query"), _turn(ASSISTANT, texts[1], "response")]
    return _after_history(row, turns, source)


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
    """Return a prompt in Alpaca's format and its answer. If the row has the field `system` or `history`, even if it is
    empty, return the turns of a chat."""
    instruction, answer = required_text(row, "instruction", source), required_text(row, "output", source)
    context = _optional_text(row, "input", source)
    if row.get("system") is not None or row.get("history") is not None:
        question = f"{instruction}\n{context}" if context.strip() else instruction
        turns = [_turn(USER, question, "instruction"), _turn(ASSISTANT, answer, "output")]
        return _after_history(row, turns, source)
    template = _ALPACA_INPUT if context.strip() else _ALPACA
    return template.format(instruction=instruction, input=context), answer


def _after_history(row: Fields, turns: list[Turn], source: str) -> list[Turn]:
    """Return the turns of the fields `system` and `history`, followed by `turns`."""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        said = f"{source}: field 'history' is {shown(history)}, not a list of [question, answer] pairs"
        raise UserError(f"{said}; correct the row")
    before = []
    for number, pair in enumerate(history, start=1):
        for role, text in zip((USER, ASSISTANT), pair, strict=True):
            part = f"{'question' if role == USER else 'answer'} of pair {number}"
            before.append(_turn(role, checked_text(text, "history", f"{source}, {part}"), "history", part))
    return [*_system_turn(row, source), *before, *turns]


def _system_turn(row: Fields, source: str) -> list[Turn]:
    system = _optional_text(row, "system", source)
    return [_turn("system", system, "system")] if system else []


def _turn(role: str, text: str, field: str, part: str = "") -> Turn:
    """Return a turn with a text of a field. `part` describes the text if it is only a part of the field."""
    name = f"field {field!r}" + (f", {part}" if part else "")
    return Turn({"role": role, "content": text}, role == ASSISTANT, name)


def _optional_text(row: Fields, name: str, source: str) -> str:
    value = row.get(name)
    return "" if value is None else checked_text(value, name, source, allow_empty=True)


# The table --------------------------------------------------------------------------------------------------

SHAPES = (
    RowShape(
        "messages",
        ("messages",),
        lambda row, source: read_turns(row["messages"], "messages", source),
        ("tools", "functions"),
    ),
    RowShape(
        "ShareGPT",
        ("conversations",),
        lambda row, source: _system_turn(row, source) + read_turns(row["conversations"], "conversations", source),
        ("system", "tools"),
    ),
    RowShape("prompt/completion", ("prompt", "completion"), _prompt_completion, ("tools",)),
    RowShape("query/response", ("query", "response"), _query_response, ("system", "history", "tools")),
    RowShape("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
    RowShape(
        "input/output",
        ("input", "output"),
        lambda row, source: (required_text(row, "input", source), required_text(row, "output", source)),
    ),
    RowShape("text", ("text",), lambda row, source: ("", required_text(row, "text", source))),
)
REFERENCES = "references"  # more accepted answers, in a row of any shape
OUR_FIELDS = frozenset((*(name for shape in SHAPES for name in shape.fields), REFERENCES))
# Names of fields with data in the formats of other tools. A row is rejected if such a field is not read.
_LOOKS_LIKE_DATA = OUR_FIELDS | {
    *("question", "answer", "answers", "context", "target", "targets", "label", "labels", "choices", "options"),
    *("chosen", "rejected", "rejected_response", "rejected_messages", "solution", "reasoning", "rationale", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos", "documents", "objects", "summary", "translation"),
    *("prefix", "suffix", "system_prompt", "conversation", "dialogue", "chat", "turns", "chat_template_kwargs"),
}


def find_shape(
    row: Fields, source: str, *, named: Collection[str] = (), columns: Mapping[str, str] | None = None
) -> RowShape:
    """Return the shape of a row. Raises UserError if no shape or several shapes match, or if the row has a field that
    looks like data but would not be read.

    Args:
        named: the fields that the user's prompt template reads.
        columns: the user's field name for each field name of the task, from --columns. The shape must read all of these
            fields. If these include all fields that a shape needs, this shape is chosen, and fields of other shapes are
            ignored.
    """
    columns = columns or {}
    found = [shape for shape in SHAPES if all(row.get(name) is not None for name in shape.needs)]
    found = found or [shape for shape in SHAPES if all(name in row for name in shape.needs)]  # a field is null
    preference = ""
    if any(not readers.is_empty(row.get(name)) for name in ("rejected", "rejected_response", "rejected_messages")):
        preference = ". Training on preference data is not supported"
    if not found:
        after = " (as named by --columns)" if columns else ""
        way = ". Name your fields with --columns OURS=YOURS[,...]"
        if preference:
            chosen = "--columns prompt=prompt,completion=chosen or --columns messages=chosen"
            way = f"{preference}; to train only on the chosen answers, use {chosen}"
        *listed, last = ("{" + ", ".join(f'"{name}"' for name in shape.needs) + "}" for shape in SHAPES)
        expected = f"{', '.join(listed)} or {last}"
        raise UserError(f"{source}: the row has {describe_fields(row)}{after}; expected {expected}{way}")
    found.sort(key=lambda shape: len(_unread_by(shape, columns)))
    shape = found[0]
    for name in _unread_by(shape, columns):
        said = f"{source}: --columns {name}={columns[name]}: rows of shape {shape.name} have no field {name!r}"
        raise UserError(f"{said}, only {', '.join((*shape.fields, REFERENCES))}; remove it")
    if columns and set(shape.needs) <= columns.keys():
        return shape
    for other in found[1:]:
        if not _unread_by(other, columns) and not set(other.needs) <= set(shape.fields):
            raise UserError(
                f"{source}: the row has the fields of two shapes, {shape.name} and {other.name}; choose one with"
                f" --columns {_choice(shape, columns)} or --columns {_choice(other, columns)}"
            )
    for name, value in row.items():
        unread = name in _LOOKS_LIKE_DATA and name not in (*shape.fields, REFERENCES) and name not in named
        if unread and not readers.is_empty(value):
            said = f"{source}: field {name!r} looks like data, but is not read from rows of shape {shape.name}"
            raise UserError(f"{said}; name the fields to read with --columns {_choice(shape, columns)}{preference}")
    return shape


def _unread_by(shape: RowShape, columns: Collection[str]) -> list[str]:
    """Return the fields that --columns names but the shape does not read."""
    return [name for name in columns if name not in (*shape.fields, REFERENCES)]


def _choice(shape: RowShape, columns: Mapping[str, str]) -> str:
    """Return the value of --columns that chooses the shape."""
    fields = {**columns, **{name: columns.get(name, name) for name in shape.needs}}
    return ",".join(f"{ours}={theirs}" for ours, theirs in fields.items())


def _parts(row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    """Return the `Parts` of a row. A template may use all fields but the answers, and the default prompt as `prompt`.

    Raises UserError if the row has no valid shape, or if a field is empty.
    """
    shape = find_shape(row, source, named=template_fields(reading.template), columns=reading.columns)
    content = shape.read(row, source)
    references = row.get(REFERENCES)
    more = () if references is None else required_texts(references, REFERENCES, source)
    fields = without(row, shape.needs[-1], REFERENCES)
    if isinstance(content, tuple):
        prompt, answer = content
        return Parts({**fields, "prompt": prompt}, prompt, (answer, *more), shape=shape.name)
    read = row if "functions" in shape.may else without(row, "functions")
    chat = _chat(make_conversation(content, read, source), source, reading)
    answer = chat.turns[-1].message.get("content") or ""  # '' if the turn only calls tools
    return Parts(fields, None, (answer, *more), conversation=chat, shape=shape.name)


def _chat(chat: Conversation, source: str, reading: Reading) -> Conversation:
    """Return the conversation with its supervised or scored turns marked. Raises UserError if no turn is supervised."""
    if not reading.trains:
        return chat.with_last_turn_alone(scored=True)
    if not any(turn.trained for turn in chat.turns):
        said = f"{source}: no answer of the assistant is supervised (train, weight or loss is false in each)"
        raise UserError(f"{said}; remove the row, or set 'train' to true in an answer")
    if reading.train_on == "last_turn" and not (last := chat.turns[-1]).trained:
        raise UserError(
            f"{source}, {last.name}: is not supervised (train, weight or loss is false), but --train_on last_turn"
            " trains only this turn; remove the row, or give --train_on all_turns"
        )
    return chat


TASK = Task(name="custom", fields=(), template="", parts=_parts, metrics=("exact_match",), known_fields=OUR_FIELDS)
