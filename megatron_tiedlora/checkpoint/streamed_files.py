"""Writes safetensors files of tensors that are made block by block, so it needs the memory of one block.

`safetensors.torch.save_file` takes all tensors of a file at once. The files are alike: a header, and the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_tiedlora.base.atomic import sync_path, write_json
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_weights import INDEX_FILE, SINGLE_FILE
from megatron_tiedlora.checkpoint.tensor_files import TYPE_NAMES

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made block by block.

    Attributes:
        blocks: makes the blocks; their values follow each other as in the whole tensor of `shape`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedFile(NamedTuple):
    """A file of a model's folder.

    Attributes:
        head: what stands in front of the values; see `file_head`.
        tensors: whose values follow each other.
    """

    name: str
    head: bytes
    tensors: Sequence[StreamedTensor]

    @property
    def value_bytes(self) -> int:
        """The size of its values."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def write_streamed(
    folder: Path, tensors: Sequence[StreamedTensor], *, shard_bytes: int = SHARD_BYTES, progress: bool = False
) -> None:
    """Write the tensors as a Hugging Face folder's weights: one file, or shards of `shard_bytes` with an index.

    A tensor is not divided, so a larger one is a shard of its own.
    """
    shards = _shards(tensors, shard_bytes)
    files: list[StreamedFile] = []
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        index |= dict.fromkeys((tensor.name for tensor in shard), name)
        files.append(StreamedFile(name, _head_of(shard), shard))
    write_files(folder, files, bar="weights", progress=progress)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})


def write_files(folder: Path, files: Sequence[StreamedFile], *, bar: str, progress: bool = False) -> None:
    """Write files in which each tensor's values are made as they are written. `bar` is what the progress bar says."""
    total = sum(file.value_bytes for file in files)
    with progress_bar(bar, "B", total=total, shows=progress) as shown, ThreadPoolExecutor(1) as thread:
        flushed = []
        for file in files:
            _write_file(folder / file.name, file, shown.update)
            flushed.append(thread.submit(sync_path, folder / file.name))  # while the next one is written
        for flush in flushed:
            flush.result()


def _shards(tensors: Sequence[StreamedTensor], shard_bytes: int) -> list[list[StreamedTensor]]:
    shards: list[list[StreamedTensor]] = []
    left = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > left:
            shards.append([])
            left = shard_bytes
        shards[-1].append(tensor)
        left -= tensor.num_bytes
    return shards


def file_head(entries: Mapping[str, Mapping[str, object]]) -> bytes:
    """What stands in front of the values in a file: the header of its entries, and the header's length."""
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-len(raw) % 8)  # the values begin at a multiple of 8, as safetensors' own do
    return len(raw).to_bytes(8, "little") + raw


def _head_of(tensors: Sequence[StreamedTensor]) -> bytes:
    entries = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        kind = TYPE_NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (start, end)}
    return file_head(entries)


def _write_file(path: Path, file: StreamedFile, wrote: Callable[[int], object]) -> None:
    with path.open("wb") as stream:
        stream.write(file.head)
        for tensor in file.tensors:
            size = 0
            for block in tensor.blocks():
                assert block.dtype == tensor.dtype, tensor.name
                size += stream.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
                wrote(block.nbytes)
            assert size == tensor.num_bytes, tensor.name
