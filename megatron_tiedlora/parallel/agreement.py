"""Exchange small values between all ranks outside the model: sums, errors and decisions of rank 0.

With a single rank nothing is sent. Everything is sent as CPU tensors over gloo, so no rank waits for a GPU. If a peer
has died, the exchange raises an error at once (a first one with `TORCH_GLOO_LAZY_INIT` may hang). The size is sent
first, then the value as bytes. Fields, strings and numbers are sent as JSON, tensors as safetensors:

    message = length of the JSON (8 bytes) | JSON | safetensors, if there are tensors

The receiver knows the expected type and rejects any other value. Messages contain no code and no type names,
and they are never unpickled.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from pydantic import PlainValidator, TypeAdapter, ValidationError, ValidationInfo
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, distributed

from megatron_tiedlora.base.files import first_problem
from megatron_tiedlora.base.messages import UserError, shown

Value = TypeVar("Value")

_RING_RANKS = 16  # ranks that sum on a ring; no host of 16 GPUs or fewer uses the tree
_TREE_TAG = 1  # DeepSpeed's messages between pipeline stages have the tag 0


def world_size() -> int:
    """Return the number of ranks in the process group, or 1 if there is no group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the elementwise fp64 sum of `values` over all ranks. Every rank gets the same result."""
    return _reduced(torch.tensor(values, dtype=torch.float64), distributed.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the elementwise fp64 maximum of `values` over all ranks. Every rank gets the same result."""
    return _reduced(torch.tensor(values, dtype=torch.float64), distributed.ReduceOp.MAX)


def gather_numbers(value: int) -> list[int]:
    """Gather an integer below 2^63 from each rank, and return the list in rank order on every rank."""
    numbers = torch.zeros(world_size(), dtype=torch.int64)
    numbers[distributed.get_rank() if len(numbers) > 1 else 0] = value
    return _reduced(numbers, distributed.ReduceOp.SUM)


def _reduced(numbers: Tensor, op: distributed.ReduceOp.RedOpType) -> list[Any]:
    """Return the elementwise result over all ranks, with the same bits on every rank. `numbers` is overwritten.

    Among n ranks, gloo's all-reduce is a ring of 2 (n - 1) hops. More than `_RING_RANKS` ranks reduce to rank 0 on a
    binomial tree, and gloo broadcasts the result on such a tree: 2 log2(n) hops. The order of additions depends only
    on n. Most hops are between ranks of one host, because launchers number the ranks of a host consecutively.
    """
    size, step = world_size(), 1
    if size > _RING_RANKS:
        rank, combine = distributed.get_rank(), torch.add if op == distributed.ReduceOp.SUM else torch.maximum
        while step < size and not rank & step:
            if rank + step < size:
                distributed.recv(other := torch.zeros_like(numbers), rank + step, tag=_TREE_TAG)
                combine(numbers, other, out=numbers)
            step *= 2
        if rank:
            distributed.send(numbers, rank - step, tag=_TREE_TAG)
        distributed.broadcast(numbers, src=0)
    elif size > 1:
        distributed.all_reduce(numbers, op=op)
    return numbers.tolist()


def first_messages(messages: Sequence[str | None]) -> list[str | None]:
    """Return for each element of `messages` the message of the lowest rank that has one, or None, on every rank.

    All ranks have the same number of elements. If no rank has a message, ranks only exchange one sum.
    """
    if world_size() == 1 or not messages:
        return list(messages)
    counts = sum_over_ranks([float(message is not None) for message in messages])
    return [_sent_by_first(message) if count else None for message, count in zip(messages, counts, strict=True)]


def _sent_by_first(message: str | None) -> str:
    # A text that is not Unicode is sent with escapes, because an encoding error here would hide the message.
    mine = bytearray() if message is None else packed(message.encode(errors="backslashreplace").decode())
    sizes = gather_numbers(len(mine))
    speaker = next(rank for rank, size in enumerate(sizes) if size)
    sent = _broadcast(mine, sizes[speaker], source=speaker, largest=LARGEST_JSON)
    return cast(str, unpacked(str, sent, sender=speaker))


def gather_on_rank_0(value: Value, *, kind: Any) -> list[Value] | None:
    """Return the values of all ranks, of type `kind`, in rank order on rank 0. Return None on other ranks.

    Raises:
        UserError: a value is too large (raised on every rank), or is not of type `kind` (raised on rank 0).
    """
    if world_size() == 1:
        return [value]
    message = packed(value)
    sizes = gather_numbers(len(message))
    for rank, size in enumerate(sizes):
        _check_size(size, sender=rank, largest=LARGEST_JSON)
    longest = torch.zeros(max(sizes), dtype=torch.uint8)
    longest[: len(message)] = torch.frombuffer(message, dtype=torch.uint8)
    parts = [torch.empty_like(longest) for _ in sizes] if distributed.get_rank() == 0 else None
    distributed.gather(longest, parts, dst=0)
    if parts is None:
        return None
    return [
        unpacked(kind, part[:size].numpy().data, sender=rank)
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]


def num_differing(value: str) -> int:
    """Return the number of ranks whose value differs from the value on rank 0. Every rank gets the result."""
    first = decided_by_rank_0(lambda: value, kind=str)
    return round(sum_over_ranks([float(value != first)])[0])


def decided_by_rank_0(decide: Callable[[], Value], *, kind: Any = None) -> Value:
    """Call `decide` on rank 0 only, and return its result on every rank.

    Args:
        kind: the type of the result, which `packed` must support; None if the result is None.

    Raises:
        UserError: `decide` raised it on rank 0. Then all ranks raise this error, so that no rank hangs. The other ranks
            also raise an error if the result is not of type `kind`.
    """
    if world_size() == 1:
        return decide()
    here, message = distributed.get_rank() == 0, bytearray()
    failure: UserError | None = None
    if here:
        try:
            value = decide()
            message = packed(value)
        except UserError as error:
            failure, message = error, packed(str(error))
    header = torch.tensor([failure is not None, len(message)], dtype=torch.int64)
    distributed.broadcast(header, src=0)
    failed, size = header.tolist()
    sent = _broadcast(message, size, source=0, largest=LARGEST_MESSAGE)
    if failed and failure is None:
        failure = UserError(unpacked(str, sent, sender=0))
        failure.of_peer = True
    if failure is not None:
        raise failure
    return value if here else unpacked(kind, sent, sender=0)


def raise_on_every_rank(failure: UserError | None) -> None:
    """Raise the `failure` of rank 0 on every rank if it is not None. All ranks must call this function together."""

    def tell() -> None:
        if failure is not None:
            raise failure

    decided_by_rank_0(tell)


def _broadcast(message: bytearray, size: int, *, source: int, largest: int) -> bytearray | memoryview:
    """Return the message of rank `source`, with `size` bytes, on every rank. Raise UserError if it is too large."""
    _check_size(size, sender=source, largest=largest)
    here = distributed.get_rank() == source
    data = torch.frombuffer(message, dtype=torch.uint8) if here else torch.empty(size, dtype=torch.uint8)
    distributed.broadcast(data, src=source)
    return message if here else data.numpy().data


def _check_size(size: int, *, sender: int, largest: int) -> None:
    if not 0 < size <= largest:
        raise unreadable(sender, f"its size of {size} bytes is not between 1 and {largest}")


# Values as bytes ------------------------------------------------------------------------------------------------------

LARGEST_JSON = 1 << 30  # bytes of JSON
LARGEST_MESSAGE = 1 << 36  # bytes with tensors: three times the largest adapter that a node's memory can hold
_LENGTH_BYTES = 8


def _sent_tensor(name: object, info: ValidationInfo) -> Tensor:
    """Return the tensor that the message stores under `name`."""
    sent: Any = info.context
    if not isinstance(name, str) or name not in sent:
        raise ValueError("no tensor with this name was sent")
    return cast(Tensor, sent[name])


SentTensor = Annotated[Tensor, PlainValidator(_sent_tensor)]
"""The type of a tensor in a dataclass that ranks send each other."""


def packed(value: object) -> bytearray:
    """Return a value serialised as a message. Numbers are reproduced exactly.

    Args:
        value: None, a string, number, path or tensor, or lists, tuples, mappings and dataclasses of such values.

    Raises:
        UserError: a string is not valid Unicode.
    """
    tensors: dict[str, Tensor] = {}

    def plain(part: object) -> object:
        if isinstance(part, Tensor):
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
        raise UserError(
            f"a text that is not valid Unicode cannot be sent to other ranks ({part}). Remove the invalid characters"
        ) from None
    message = bytearray(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
    if tensors:
        message += save(tensors)
    return message


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes milliseconds to build for a dataclass with dataclasses inside


def unpacked(kind: Any, message: bytes | bytearray | memoryview, *, sender: int) -> Any:
    """Return the value of type `kind` in a message of rank `sender`. Mappings become dicts; types are not converted.

    Raises:
        UserError: the message does not contain a value of this type.
    """
    view = memoryview(message)
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    rest = len(view) - _LENGTH_BYTES - length
    if rest < 0 or length > LARGEST_JSON:
        raise unreadable(sender, f"its JSON of {length} bytes does not fit into {len(view)} bytes")
    end = _LENGTH_BYTES + length
    try:
        tensors = load(bytes(view[end:])) if rest else {}
        return _adapter(kind).validate_json(bytes(view[_LENGTH_BYTES:end]), strict=True, context=tensors)
    except ValidationError as error:
        raise unreadable(sender, first_problem(error).removeprefix(" = ")) from None
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # a dtype that torch lacks is a KeyError
        raise unreadable(sender, f"{type(error).__name__}: {error}") from None


def unreadable(sender: int, problem: str) -> UserError:
    """Return the error for a message that does not contain a value of the expected type."""
    return UserError(f"the message of rank {sender} cannot be read ({problem}). Use the same installation on all ranks")
