"""What ranks tell each other outside the model: equal values on every rank, errors on every rank, and no code."""

from __future__ import annotations

import math
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.forked_ranks import run_on_ranks
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import Target, make_adapter_config
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import SHAPE_FIELDS, BaseIdentity
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.parallel import agreement
from megatron_tiedlora.parallel.agreement import (
    SentTensor,
    decided_by_rank_0,
    first_messages,
    gather_on_rank_0,
    num_differing,
    packed,
    raise_on_every_rank,
    unpacked,
)
from megatron_tiedlora.parallel.groups import WORLD, Traffic, TrafficCounter

TEXT = 'Grüße, 日本 \U0001f600, line\nbreak, quote " back\\slash, \x00 and \x1b[2J'
LARGE = 20 * 2**20


def floats(count: int = 5000) -> list[float]:
    """Floats of all sizes, subnormal ones and both zeros among them."""
    draw = random.Random(3)
    drawn = (struct.unpack("<d", draw.getrandbits(64).to_bytes(8, "little"))[0] for _ in range(count))
    return [5e-324, -0.0, 0.0, 1.7976931348623157e308, 0.1, *(value for value in drawn if math.isfinite(value))]


def bits(values: list[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


def checkpoint() -> Checkpoint:
    """With every kind of field: texts, numbers, None, tuples, mappings, tensors of several shapes and dtypes."""
    draw = torch.Generator().manual_seed(5)
    config = make_adapter_config("tl6", rank=3, layers=(1, 3), targets=(Target("qkv", 8, (8, 4, 4), "column"),), seed=5)
    base = BaseIdentity(
        **dict.fromkeys(SHAPE_FIELDS, 2), base_model=TEXT, base_hash="c" * 64, base_weights_hash="w" * 64, dtype="bf16"
    )
    state = {"A": torch.randn(3, 8, generator=draw), "B": torch.tensor([[math.nan, -0.0], [math.inf, 1e-42]])}
    moments = {f"exp_avg.{TEXT}": torch.randn(5, generator=draw).bfloat16(), "count": torch.tensor(7)}
    settings = {"seed": 5, "layers": [1, 3], "alpha": 0.1, "task": TEXT, "none": None, "flag": True, "odd": [math.inf]}
    adapter = NativeAdapter(config, base, state)
    return Checkpoint(Path("/runs/é"), Progress(step=4, best_metric=0.1 + 0.2, best_step=2), adapter, moments, settings)


def same(found: Any, expected: Any) -> bool:
    """Equal, of the same types, tensors and floats bit for bit."""
    if isinstance(expected, torch.Tensor):
        raw = [tensor.reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*raw)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if hasattr(expected, "__dataclass_fields__"):
        return same(vars(found), vars(expected))
    return bits([found]) == bits([expected]) if isinstance(expected, float) else bool(found == expected)


def never() -> Any:
    raise AssertionError("only rank 0 decides")


# On ranks ---------------------------------------------------------------------------------------------------------


def _agree() -> dict[str, Any]:
    rank = distributed.get_rank()

    def decided(value: Any, kind: Any) -> Any:
        return decided_by_rank_0((lambda: value) if rank == 0 else never, kind=kind)

    kept = checkpoint()
    score = Score("exact_match", 100 / 3, 0.0, 100.0, 3, TEXT)
    values = [
        (None, None),
        ("", str),
        (TEXT, str),
        (Path("/runs/é 日本"), Path),
        (floats(), list[float]),
        ([math.inf, -math.inf, math.nan], list[float]),
        ({"exact_match": score}, dict[str, Score]),
        (None, Checkpoint | None),
        (kept, Checkpoint | None),
        (kept.adapter, NativeAdapter),
        ("é" * (LARGE // 2), str),
    ]
    found = [same(decided(value, kind), value) for value, kind in values]
    large = {"A": torch.arange(LARGE // 4, dtype=torch.float32).view(-1, 64)}
    sent = decided(NativeAdapter(kept.adapter.config, kept.adapter.base_identity, large), NativeAdapter)
    answers = {rank: (TEXT * rank, tuple(floats(rank)))}
    texts = gather_on_rank_0(answers, kind=dict[int, tuple[str, tuple[float, ...]]])
    return {
        "values": found,
        "large": torch.equal(sent.state["A"], large["A"]),
        "gathered": texts,
        "large gathered": [len(text) for text in gather_on_rank_0("x" * (LARGE * (rank == 1)), kind=str) or []],
        "nothing to say": first_messages([None]),
        "first": first_messages([f"{rank} {TEXT}" if rank else None]),
        "empty": first_messages(["" if rank == 1 else None]),
        "half a pair": first_messages(["\ud800"]),
        "raised": [_raised(None), _raised(UserError(f"of rank {rank}")), _raised(UserError("x") if rank else None)],
        "differing": (num_differing(TEXT), num_differing(f"{TEXT} {min(rank, 1)}")),
    }


def _raised(failure: UserError | None) -> str | None:
    try:
        raise_on_every_rank(failure)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.distributed
def test_all_ranks_have_the_same(tmp_path: Path) -> None:
    found = run_on_ranks(_agree, ranks=3, folder=tmp_path)
    for rank, here in enumerate(found):
        assert all(here["values"]) and len(here["values"]) == 11, (rank, here["values"])
        assert here["large"]
        assert here["nothing to say"] == [None] and here["first"] == [f"1 {TEXT}"], "the lowest rank that has one"
        assert here["empty"] == [""] and here["half a pair"] == ["\\ud800"]
        assert here["differing"] == (0, 2)
        assert here["raised"] == [None, "of rank 0", None], "rank 0's alone"
    assert all(here["gathered"] is None and here["large gathered"] == [] for here in found[1:])
    gathered = found[0]["gathered"]
    assert same(gathered, [{rank: (TEXT * rank, tuple(floats(rank)))} for rank in range(3)]), "in rank order"
    assert found[0]["large gathered"] == [0, LARGE, 0]


class Refused(UserError):
    """As RunFailed is one."""


def _fail(cases: list[tuple[UserError | None, object]]) -> list[tuple[str, str, bool]]:
    found = []
    for error, value in cases:

        def decide(error: UserError | None = error, value: object = value) -> Any:
            if error is not None:
                raise error
            return value

        with pytest.raises(UserError) as caught:
            decided_by_rank_0(decide if distributed.get_rank() == 0 else never, kind=str)
        assert num_differing("all still meet") == 0
        found.append((type(caught.value).__name__, str(caught.value), caught.value.of_peer))
    return found


@pytest.mark.distributed
def test_an_error_of_rank_0_is_every_ranks(tmp_path: Path) -> None:
    error = Refused(f"{TEXT}: cannot be written (No space left on device)")
    own, *others = run_on_ranks(_fail, [(error, None), (None, "a \ud800 b")], ranks=3, folder=tmp_path)
    surrogate = own[1][1]
    assert own[0] == ("Refused", str(error), False) and not own[1][2]
    assert "a text that is not valid Unicode" in surrogate and "a \\ud800 b" in surrogate
    assert others == [[("UserError", str(error), True), ("UserError", surrogate, True)]] * 2


def _count() -> list[Traffic]:
    counted = []
    rank = distributed.get_rank()
    calls: list[Callable[[], object]] = [
        lambda: first_messages([None]),
        lambda: first_messages(["é" if rank else None]),
        lambda: decided_by_rank_0(lambda: "é", kind=str),
    ]
    for call in calls:
        with TrafficCounter({}) as counter:
            call()
        counted.append(counter.traffic)
    return counted


@pytest.mark.distributed
def test_how_many_messages_an_agreement_takes(tmp_path: Path) -> None:
    """Nothing to say costs one number."""
    for counted in run_on_ranks(_count, ranks=2, folder=tmp_path):
        nothing, first, decided = ({kind: (n, traffic.bytes[WORLD, kind]) for (_, kind), n in traffic.messages.items()}
                                   for traffic in counted)  # fmt: skip
        assert nothing == {"all-reduce": (1, 8)}
        assert first == {"all-reduce": (2, 8 + 16), "broadcast": (1, 8 + 4)}  # a flag, two lengths; '"é"' in UTF-8
        assert decided == {"broadcast": (2, 16 + 8 + 4)}


def test_one_rank_sends_nothing() -> None:
    thing = object()
    assert decided_by_rank_0(lambda: thing, kind=str) is thing
    assert gather_on_rank_0(thing, kind=str) == [thing]
    assert first_messages(["text"]) == ["text"] and num_differing("text") == 0
    error = UserError("mine")
    with pytest.raises(UserError) as caught:
        decided_by_rank_0(lambda: _raise(error))
    assert caught.value is error and not error.of_peer


def _raise(error: Exception) -> None:
    raise error


# Foreign bytes ----------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of it makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def framed(text: bytes, tensors: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + tensors


@dataclass(frozen=True)
class Pair:
    """A record that is sent."""

    name: str
    number: int = 0


def foreign(folder: Path) -> list[bytes]:
    """What is no `Pair`."""
    bomb = pickle.dumps(Bomb(folder / "bomb"))
    record = b'{"name": "a", "number": 1}'
    return [
        b"", b"\0", b"\0" * 8, bomb, framed(bomb), framed(b"[" * 10**6), framed(b"\xff\xfe"),
        framed(b'{"name": "\\ud800"}'), framed(b"null"),
        framed(b"5"), framed(b"[]"), framed(b'{"name": 5}'), framed(b'{"name": "a", "number": "1"}'),
        framed(b'{"name": "a", "number": true}'), framed(b'{"name": "a", "number": 1e999}'), framed(b"{}"),
        (2**62).to_bytes(8, "little") + record, (100).to_bytes(8, "little") + record, framed(record, b"\0"),
        framed(record, b"\xff" * 100), framed(record, bomb), framed(record, save({"0": torch.ones(3)})[:-1]),
        framed(record, (30).to_bytes(8, "little") + b'{"0":{"dtype":"X9","shape":[]}'),
    ]  # fmt: skip


def _receive_foreign(messages: list[bytes]) -> list[str]:
    """Rank 0 is a stranger, who sends whatever it likes."""
    found = []
    headers = [([failed, len(message)], message) for message in messages for failed in (0, 1)]
    for header, message in [*headers, ([0, -1], b""), ([0, 2**62], b"")]:
        if distributed.get_rank() == 0:
            distributed.broadcast(torch.tensor(header, dtype=torch.int64), src=0)
            if 0 < header[1] == len(message):
                distributed.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), src=0)
            continue
        try:
            found.append(f"accepted: {decided_by_rank_0(never, kind=Pair)}")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.distributed
def test_foreign_bytes_are_refused_in_one_line(tmp_path: Path) -> None:
    messages = foreign(tmp_path)
    _, found = run_on_ranks(_receive_foreign, messages, ranks=2, folder=tmp_path / "ranks")
    assert len(found) == 2 * len(messages) + 2
    for line in found:
        assert line.startswith("the message of rank 0 cannot be read (") and line.isprintable() and len(line) < 1300
    assert not (tmp_path / "bomb").exists()


def _tell_foreign(messages: list[bytes]) -> list[str]:
    """Rank 1 is a stranger to a gathering."""
    found = []
    for message in messages:
        if distributed.get_rank() == 1:
            agreement.packed = lambda _, message=message: bytearray(message)  # type: ignore[assignment,misc]
        try:
            found.append(f"accepted: {gather_on_rank_0('own', kind=str)}")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.distributed
def test_who_gathers_names_the_rank(tmp_path: Path) -> None:
    messages = [pickle.dumps("own"), framed(b"5"), b"\0"]
    main, *others = run_on_ranks(_tell_foreign, messages, ranks=3, folder=tmp_path)
    assert all(said.startswith("the message of rank 1 cannot be read (") for said in main)
    assert others == [["accepted: None"] * 3] * 2


def test_tensors_stand_only_where_they_are_due() -> None:
    """A text that looks like the name of a tensor stays a text, and a tensor is not made of anything else."""
    kept = checkpoint()
    named = Checkpoint(kept.folder, kept.progress, kept.adapter, kept.moments, {"A": "0", "list": ["1", 0]})
    assert same(unpacked(Checkpoint, packed(named), sender=0), named)
    for place in (b'"9"', b"0", b"null", b"[1.0]", b'{"0": 0}'):
        message = framed(b'{"A": ' + place + b"}", save({"0": torch.ones(2)}))
        with pytest.raises(UserError, match=r"rank 3 .*no tensor with this name was sent"):
            unpacked(dict[str, SentTensor], message, sender=3)


def test_what_is_no_value_is_our_own_fault() -> None:
    for thing in (object(), {1, 2}, torch.nn.Linear, lambda: None):
        with pytest.raises(TypeError):
            packed(thing)
