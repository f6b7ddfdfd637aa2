"""Broken files on purpose: damaged bytes, fields of other kinds, headers that lie, and what is no file at all.

Everything is drawn by a case's `Draw`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fuzzing import Draw
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from megatron_tiedlora.base.files import FILES_FIELD, SEAL_FIELD, with_checksums

# Bytes ------------------------------------------------------------------------------------------------------------

NASTY = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"{", b"[", b'"', b"}", b"]", b":",
    b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"-1", b"NaN", b"-Infinity", b"1e400", b'"\\ud800"', b'"\\u0000"',
    b"null", b"true", b"../../x", b"/etc/passwd", b"\xe2\x80\xa8", b"\x1b[2J", b"!!python/object:os.system {}",
    b"&a [*a]", b"---\n", b"? ", b"- ", b"<<: ", b"%YAML 9", b"0x" + b"f" * 5000, b"2001-99-99", b"!!int ''",
]  # fmt: skip


def damaged(draw: Draw, raw: bytes) -> bytes:
    """`raw` with one to three pieces cut off, flipped, put in, put twice, zeroed or written in another encoding."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, max(len(raw) - 1, 0))
        length = draw.randint(0, 40)
        kind = draw.choice(["cut", "flip", "flip", "replace", "insert", "drop", "twice", "zeroes", "encode"])
        draw.say(f"{kind} at {at} of {len(raw)}")
        match kind:
            case "cut":
                raw = raw[:at]
            case "flip":
                raw = raw[:at] + bytes([raw[at] ^ (1 << draw.randint(0, 7))]) + raw[at + 1 :] if raw else raw
            case "replace":
                raw = raw[:at] + _piece(draw) + raw[at + length :]
            case "insert":
                raw = raw[:at] + _piece(draw) + raw[at:]
            case "drop":
                raw = raw[:at] + raw[at + length :]
            case "twice":
                raw = raw[: at + length] + raw[at:]
            case "zeroes":
                raw = raw[:at] + bytes(len(raw[at : at + 512])) + raw[at + 512 :]
            case "encode":
                raw = raw.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))
    return raw


def _piece(draw: Draw) -> bytes:
    return draw.choice(NASTY) if draw.chance() else draw.raw()


# JSON -------------------------------------------------------------------------------------------------------------

# Written as they stand, because json.dumps would not write them.
_RAW = {
    "@huge float@": "1e400", "@digits@": "9" * 5000, "@400 digits@": "9" * 400, "@nested@": "[" * 900 + "]" * 900,
    "@too nested@": "[" * 100_000 + "]" * 100_000, "@nan@": "NaN", "@infinity@": "-Infinity",
    "@twice@": '{"a": 1, "a": 2}',
}  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 6, 300, 2**31, 2**53, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5, 1.0, -3.0, 1e-320,
    1e6, 1e300, "", " ", "1", "0", "x" * 5000, "\ud800", "a\0b", "a\nb", "\x1b[2J\x1b]0;x\x07", "../../x",
    "/etc/passwd", "..", "step_1", "step_2", "none", "auto", "lora", "tl1", "tl5", [], [[]], [True], [1], [1, 2],
    [1, "2", None], ["q_proj"], {}, {"a": 1}, {"": None}, [0] * 3000, "(a+)+$", "(.*)*x", "a{99999999}",
    "(?:q_proj){e<=30}", "{x.__class__}", *_RAW,
]  # fmt: skip


def strange_value(draw: Draw) -> Any:
    """A value of another kind, size or sign than anyone writes."""
    match draw.randint(0, 5):
        case 0:
            return draw.randint(-(2 ** draw.randint(1, 70)), 2 ** draw.randint(1, 70))
        case 1:
            return draw.randint(-1000, 1000) * 10.0 ** draw.randint(-50, 50)
        case 2:
            return draw.text()
        case _:
            return copy.deepcopy(draw.choice(STRANGE))  # which the next change may go into


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside of `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*here, key), *places(inner, (*here, key))]]


def changed_fields(draw: Draw, content: Any) -> Any:
    """A copy with one to three of its values of another kind, taken out or under another name, or with new ones."""
    content = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 3)):
        paths = places(content)
        if not paths:
            break
        *way, key = draw.choice(paths)
        holder = content
        for step in way:
            holder = holder[step]
        kind = draw.choice(["value", "value", "value", "drop", "rename", "new"])
        draw.say(f"{kind} {'.'.join(map(str, (*way, key)))[:60]}")
        match kind:
            case "value":
                holder[key] = strange_value(draw)
                draw.say(ascii(holder[key])[:60])
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw.text()] = holder.pop(key)
            case _:
                if isinstance(holder, dict):
                    holder[draw.choice(["__class__", "auto_map", "a" * 3000, draw.text()])] = 1
                else:
                    holder.insert(0, strange_value(draw))
    return content


def json_text(content: Any) -> bytes:
    """As JSON, with what `json.dumps` would not write."""
    text = json.dumps(content)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def broken_json(draw: Draw, raw: bytes) -> bytes:
    """A JSON file with damaged bytes, or with fields of other kinds."""
    return damaged(draw, raw) if draw.chance(0.4) else json_text(changed_fields(draw, json.loads(raw)))


# Safetensors ------------------------------------------------------------------------------------------------------

_DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
           torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
_LENGTHS = [0, 1, 7, 8, 2**31, 2**32, 100_000_001, 2**63, 2**64 - 1, 2**62]


def _changed_tensors(draw: Draw, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = dict(tensors)
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        kind = draw.choice(["dtype", "shape", "drop", "value", "value", "new"])
        draw.say(f"{kind} of {name}")
        match kind:
            case "dtype":
                result[name] = tensor.to(draw.choice(_DTYPES))
            case "shape":
                shapes = [tensor.flatten(), tensor[None], tensor[:0], tensor[..., :1], tensor.reshape(-1, 1)]
                result[name] = draw.choice(shapes).contiguous().clone()
            case "drop":
                result.pop(name, None)
            case "value" if tensor.is_floating_point() and tensor.numel():
                number = draw.choice([float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-45, 1e300])
                draw.say(f"{number}")
                result[name] = tensor.double().clone() if number == 1e300 else tensor.clone()
                result[name].view(-1)[draw.randint(0, tensor.numel() - 1)] = number
            case _:
                result[draw.choice(["../x", "/etc/x", "a/b", "", "\ud7ff", "\x1b[2J", "x" * 3000])] = torch.ones(2)
    return result


def broken_file(draw: Draw, name: str, raw: bytes) -> bytes:
    """`raw` broken in the ways of the file's kind, by its name."""
    return broken_safetensors(draw, raw) if name.endswith(".safetensors") else broken_json(draw, raw)


def broken_safetensors(draw: Draw, raw: bytes) -> bytes:
    """A file of other tensors, with a header that lies, or with damaged bytes."""
    length = int.from_bytes(raw[:8], "little")
    kind = draw.say(draw.choice(["tensors", "tensors", "header", "length", "bytes", "head bytes"]))
    match kind:
        case "tensors":
            return tensors_to_bytes(_changed_tensors(draw, tensors_from_bytes(raw)))
        case "header":
            header = changed_fields(draw, json.loads(raw[8 : 8 + length]))
            if header and draw.chance():
                header[draw.choice(sorted(header))] = {
                    "dtype": draw.choice(["F32", "F4", "F8_E8M0", "C64", "U64", "f32", "X", ""]),
                    "shape": [draw.choice([0, 1, 2, 2**31, 2**62, 2**63, 2**64 - 1, -1]) for _ in range(3)],
                    "data_offsets": [draw.choice([0, 1, 8, 2**40, 2**64 - 1, -1]) for _ in range(draw.randint(0, 3))],
                }
            text = json_text(header)
            return len(text).to_bytes(8, "little") + text + raw[8 + length :]
        case "length":
            return draw.choice(_LENGTHS).to_bytes(8, "little") + raw[8:]
        case "head bytes":
            return raw[:8] + damaged(draw, raw[8 : 8 + length]) + raw[8 + length :]
        case _:
            return damaged(draw, raw)


# What is no file, or a strange one --------------------------------------------------------------------------------

ODD = ("gone", "folder", "link", "link to nothing", "link to itself", "/dev/zero", "/dev/null", "pipe", "socket",
       "empty", "sparse", "sparse of 64 GB", "sparse tensor")  # fmt: skip


def odd_place(draw: Draw, path: Path) -> str:
    """Put something else in the place of the file `path`; returns what.

    A "link" leads to a copy of the file in the folder `area`; the sparse ones take no room on the disk.
    """
    elsewhere = Path.cwd().parent / "elsewhere"
    kind = draw.say(draw.choice(ODD))
    whole = path.read_bytes()
    if kind == "sparse tensor" and path.suffix == ".safetensors":
        _add_sparse_tensor(path, whole)
    elif kind.startswith("sparse"):
        os.truncate(path, 2**36 if kind == "sparse of 64 GB" else 2**31)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    match kind:
        case "folder":
            path.mkdir()
            (path / "x").write_bytes(whole)
        case "link":
            elsewhere.write_bytes(whole)
            path.symlink_to(elsewhere)
        case "link to nothing":
            path.symlink_to("nothing")
        case "link to itself":
            path.symlink_to(path.name)
        case "/dev/zero" | "/dev/null":
            path.symlink_to(kind)
        case "pipe":
            os.mkfifo(path)
        case "socket":
            _make_socket(path)
    return kind


def _add_sparse_tensor(path: Path, whole: bytes) -> None:
    """A tensor of 4 GB that nobody asked for, all of it zeroes that are not stored."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header["more"] = {"dtype": "F16", "shape": [2**31], "data_offsets": [len(data), len(data) + 2**32]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, 8 + len(text) + len(data) + 2**32)


def _make_socket(path: Path) -> None:
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # a socket's whole name may have 107 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def clear(*paths: Path) -> None:
    """Remove what stands at the paths, from the case before."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def fresh(whole: Path, folder: Path) -> Path:
    """Make `folder` a copy of the folder `whole` again, whatever stands there."""
    clear(folder)
    return Path(shutil.copytree(whole, folder))


def break_one(draw: Draw, folder: Path, names: list[str]) -> None:
    """Break one of the files `names` of `folder`: mostly what is in it, else what stands in its place."""
    path = folder / draw.say(draw.choice(names))
    if draw.chance(0.2):
        odd_place(draw, path)
    else:
        path.write_bytes(broken_file(draw, path.name, path.read_bytes()))


# Checksums --------------------------------------------------------------------------------------------------------

_SEALED = ("adapter_config.json", "trainer_state.json")  # the second one's files include the first
_SUMMED = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.safetensors")


def reseal(draw: Draw, folder: Path) -> None:
    """In most cases write the checksums of an adapter or a checkpoint anew, as one who changed it on purpose would, or
    take them out, as versions before had none."""
    way = draw.say(draw.choice(["damaged", "resealed", "resealed", "unsealed"]))
    sealing = [folder / name for name in _SEALED if way != "damaged"]
    for config in (config for config in sealing if config.is_file() and config.stat().st_size < 2**20):
        with suppress(ValueError, RecursionError):  # no JSON any more
            content = json.loads(config.read_bytes())
            if not isinstance(content, dict):
                continue
            sums = content.pop(FILES_FIELD, None)
            content.pop(SEAL_FIELD, None)
            files = [folder / name for name in _SUMMED if isinstance(sums, dict) and name in sums]
            files = [file for file in files if file.is_file() and file.stat().st_size < 2**20]
            config.write_text(json.dumps(with_checksums(content, files=files) if way == "resealed" else content))
