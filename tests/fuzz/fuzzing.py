"""Broken files on purpose: from a valid one, damaged bytes, fields of other kinds, and headers that lie.

`explore` runs a body on many drawn cases, always the same ones; `outcome` is what each has to come to: a value, or one
UserError of one line that names the place, in time, with nothing written.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from megatron_tiedlora.config.errors import UserError

SECONDS = 10.0  # of a processor, of one case; what waits for ever is ended by the test's own limit
GROWTH = 1 << 30  # bytes that a process may grow by in a test
Draw = Callable[[st.SearchStrategy[Any]], Any]


def sizes(few: int, many: int) -> pytest.MarkDecorator:
    """A test with few cases in the suite, and with many behind the slow marker; its argument is `examples`."""
    quick = pytest.param(few, marks=pytest.mark.timeout(240), id="few")
    slow = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="many")
    return pytest.mark.parametrize("examples", [quick, slow])


def explore(examples: int, body: Callable[[Draw], None]) -> None:
    """Call `body` on `examples` cases; of one that fails, hypothesis finds the smallest."""

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        body(lambda strategy: data.draw(strategy))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < GROWTH, f"grew by {grown:,} bytes"


def tree(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Every path under `folder` with its mode, its time of change, and its content or where it leads."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def outcome(load: Callable[[], Any], *, unchanged: Path, names: tuple[str, ...]) -> Any:
    """What `load` returns, or the UserError that it raises, which is then one line with one of `names` in it."""
    before, started = tree(unchanged), time.process_time()
    try:
        value = load()
    except UserError as error:
        value = error
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 1500, line
        assert any(name in line for name in names), line
    assert time.process_time() - started < SECONDS
    assert tree(unchanged) == before
    return value


# Bytes ------------------------------------------------------------------------------------------------------------

NASTY = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"{", b"[", b'"', b"}", b"]", b":",
    b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"-1", b"NaN", b"-Infinity", b"1e400", b'"\\ud800"', b'"\\u0000"',
    b"null", b"true", b"../../x", b"/etc/passwd", b"\xe2\x80\xa8", b"\x1b[2J", b"!!python/object:os.system {}",
    b"&a [*a]", b"---\n", b"? ", b"- ", b"<<: ", b"%YAML 9", b"0x" + b"f" * 5000, b"2001-99-99", b"!!int ''",
]  # fmt: skip


def damaged(draw: Draw, raw: bytes) -> bytes:
    """`raw` with one to three pieces cut off, flipped, put in, put twice or written in another encoding."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["cut", "flip", "replace", "insert", "drop", "twice", "encode"])):
            case "cut":
                raw = raw[:at]
            case "flip":
                raw = raw[:at] + bytes([raw[at] ^ (1 << draw(st.integers(0, 7)))]) + raw[at + 1 :] if raw else raw
            case "replace":
                raw = raw[:at] + draw(st.sampled_from(NASTY) | st.binary(max_size=8)) + raw[at + length :]
            case "insert":
                raw = raw[:at] + draw(st.sampled_from(NASTY) | st.binary(max_size=8)) + raw[at:]
            case "drop":
                raw = raw[:at] + raw[at + length :]
            case "twice":
                raw = raw[: at + length] + raw[at:]
            case "encode":
                raw = raw.decode("utf-8", "replace").encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))
    return raw


# JSON -------------------------------------------------------------------------------------------------------------

# Written as they stand, because json.dumps would not write them.
_RAW = {
    "@huge float@": "1e400", "@digits@": "9" * 5000, "@400 digits@": "9" * 400, "@nested@": "[" * 900 + "]" * 900,
    "@too nested@": "[" * 100_000 + "]" * 100_000, "@nan@": "NaN", "@infinity@": "-Infinity",
    "@twice@": '{"a": 1, "a": 2}',
}  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e300, "",
    " ", "1", "0", "x" * 5000, "\ud800", "a\0b", "a\nb", "../../x", "/etc/passwd", "..", "step_1", "none", "auto", [],
    [[]], [True], [1, "2", None], ["q_proj"], {}, {"a": 1}, {"": None}, [0] * 3000, "(a+)+$", "(.*)*x",
    "{x.__class__}", *_RAW,
]  # fmt: skip
strange_values = st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=5)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside of `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*here, key), *places(inner, (*here, key))]]


def changed_fields(draw: Draw, content: Any) -> Any:
    """A copy with one to three of its values of another kind, taken out or under another name, or with new ones."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        paths = places(content)
        if not paths:
            break
        *way, key = draw(st.sampled_from(paths))
        holder = content
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(["value", "value", "value", "drop", "rename", "new"])):
            case "value":
                holder[key] = copy.deepcopy(draw(strange_values))  # which the next change may go into
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = holder.pop(key)
            case _:
                if isinstance(holder, dict):
                    holder[draw(st.text(max_size=5) | st.sampled_from(["__class__", "auto_map", "a" * 3000]))] = 1
                else:
                    holder.insert(0, copy.deepcopy(draw(strange_values)))
    return content


def json_text(content: Any) -> bytes:
    """As JSON, with what `json.dumps` would not write."""
    text = json.dumps(content)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def broken_json(draw: Draw, raw: bytes) -> bytes:
    """A JSON file with damaged bytes, or with fields of other kinds."""
    return damaged(draw, raw) if draw(st.booleans()) else json_text(changed_fields(draw, json.loads(raw)))


# Safetensors ------------------------------------------------------------------------------------------------------

_DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
           torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
_LENGTHS = [0, 1, 7, 8, 2**31, 2**32, 100_000_001, 2**63, 2**64 - 1, 2**62]


def _changed_tensors(draw: Draw, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        match draw(st.sampled_from(["dtype", "shape", "drop", "value", "new"])):
            case "dtype":
                result[name] = tensor.to(draw(st.sampled_from(_DTYPES)))
            case "shape":
                shapes = [tensor.flatten(), tensor[None], tensor[:0], tensor[..., :1], tensor.reshape(-1, 1)]
                result[name] = draw(st.sampled_from(shapes)).contiguous().clone()
            case "drop":
                result.pop(name, None)
            case "value" if tensor.is_floating_point():
                number = draw(st.sampled_from([float("nan"), float("inf"), -1.0, 1e300]))
                result[name] = tensor.double().clone() if number == 1e300 else tensor.clone()
                result[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number
            case _:
                result[draw(st.sampled_from(["../x", "/etc/x", "a/b", "", "\ud7ff", "x" * 3000]))] = torch.ones(2)
    return result


def broken_file(draw: Draw, name: str, raw: bytes) -> bytes:
    """`raw` broken in the ways of the file's kind, by its name."""
    return broken_safetensors(draw, raw) if name.endswith(".safetensors") else broken_json(draw, raw)


def broken_safetensors(draw: Draw, raw: bytes) -> bytes:
    """A file of other tensors, with a header that lies, or with damaged bytes."""
    length = int.from_bytes(raw[:8], "little")
    match draw(st.sampled_from(["tensors", "header", "length", "bytes", "head bytes"])):
        case "tensors":
            return tensors_to_bytes(_changed_tensors(draw, tensors_from_bytes(raw)))
        case "header":
            header = changed_fields(draw, json.loads(raw[8 : 8 + length]))
            if header and draw(st.booleans()):
                entry = draw(st.sampled_from(sorted(header)))
                header[entry] = {
                    "dtype": draw(st.sampled_from(["F32", "F4", "F8_E8M0", "C64", "U64", "f32", "X", ""])),
                    "shape": draw(st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, 2**63, 2**64 - 1, -1]), max_size=3)),
                    "data_offsets": draw(st.lists(st.sampled_from([0, 1, 8, 2**40, 2**64 - 1, -1]), max_size=3)),
                }
            text = json_text(header)
            return len(text).to_bytes(8, "little") + text + raw[8 + length :]
        case "length":
            return draw(st.sampled_from(_LENGTHS)).to_bytes(8, "little") + raw[8:]
        case "head bytes":
            return raw[:8] + damaged(draw, raw[8 : 8 + length]) + raw[8 + length :]
        case _:
            return damaged(draw, raw)
