"""Values as bytes between ranks: JSON for fields, texts and numbers, safetensors for tensors. No bytes can be code.

    message = length of the JSON (8 bytes) | JSON | safetensors, if there are tensors

The receiver names the type of the value and rejects anything else: nothing in a message names code or a type.
`agreement` sends and receives the messages.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PlainValidator, TypeAdapter, ValidationError, ValidationInfo
from safetensors import SafetensorError
from safetensors.torch import load, save

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import first_problem

LARGEST_JSON = 1 << 30  # bytes of JSON
LARGEST_MESSAGE = 1 << 36  # with tensors: three times the largest adapter that a node's memory holds
_LENGTH_BYTES = 8


def _sent_tensor(name: object, info: ValidationInfo) -> torch.Tensor:
    """The tensor called `name` in the message."""
    sent: Any = info.context
    if not isinstance(name, str) or name not in sent:
        raise ValueError("no tensor of that name was sent")
    tensor: torch.Tensor = sent[name]
    return tensor


SentTensor = Annotated[torch.Tensor, PlainValidator(_sent_tensor)]
"""The type of a tensor in a dataclass that ranks send each other."""


def packed(value: object) -> bytearray:
    """A value as a message. Numbers keep every bit.

    Args:
        value: None, a text, number, path or tensor, or lists, tuples, mappings and dataclasses of these.

    Raises:
        UserError: a text is not Unicode.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(part: object) -> object:
        if isinstance(part, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = part.detach().cpu().contiguous()
            return name
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        if isinstance(part, Mapping):
            return dict(part)
        if isinstance(part, Path):
            return str(part)
        raise TypeError(f"a {type(part).__name__} cannot be sent to other ranks")

    text = json.dumps(value, ensure_ascii=False, default=plain)
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        part = shown(text[max(0, error.start - 20) : error.end + 20])
        raise UserError(f"a text with half of a surrogate pair cannot be sent to other ranks ({part})") from None
    message = bytearray(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
    if tensors:
        message += save(tensors)
    return message


def unpacked(kind: Any, message: bytes | bytearray | memoryview, *, sender: int) -> Any:
    """The value of type `kind` in a message of rank `sender`. Mappings become dicts; no type is converted.

    Raises:
        UserError: the message does not hold such a value.
    """
    view = memoryview(message)
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    rest = len(view) - _LENGTH_BYTES - length
    if rest < 0 or length > LARGEST_JSON:
        raise unreadable(sender, f"its JSON has {length} bytes of {len(view)}")
    end = _LENGTH_BYTES + length
    try:
        tensors = load(bytes(view[end:])) if rest else {}
        return TypeAdapter(kind).validate_json(bytes(view[_LENGTH_BYTES:end]), strict=True, context=tensors)
    except ValidationError as error:
        raise unreadable(sender, first_problem(error).removeprefix(" = ")) from None
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # a dtype that torch lacks is a KeyError
        raise unreadable(sender, f"{type(error).__name__}: {error}") from None


def unreadable(sender: int, problem: str) -> UserError:
    """The error for a message that does not hold a value of the expected type."""
    return UserError(f"the message of rank {sender} cannot be read ({problem}). Start all ranks from one installation")
