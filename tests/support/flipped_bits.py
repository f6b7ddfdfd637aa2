"""Changes one bit of one value in a safetensors file, which is read here without the library."""

from __future__ import annotations

import json
from pathlib import Path


def flip_bit(file: Path, name: str, *, row: int = 0, column: int = 0, bit: int = 0) -> None:
    """Flip a bit (0: the lowest of the value) of one value of the tensor `name`, in place."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[entry["dtype"]]
        width = entry["shape"][1] if len(entry["shape"]) > 1 else 1
        place = 8 + length + entry["data_offsets"][0] + (row * width + column) * size + bit // 8
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


def file_of(folder: Path, name: str) -> Path:
    """The file of a Hugging Face folder that holds the tensor `name`."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return folder / "model.safetensors"
    return folder / str(json.loads(index.read_text())["weight_map"][name])
