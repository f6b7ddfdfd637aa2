"""Writes safetensors files of tensors that are made block by block, so it needs the memory of one block.

`safetensors.torch.save_file` takes all tensors of a file at once. The files are alike: a header, and the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_weights import INDEX_FILE, SINGLE_FILE
from megatron_tiedlora.checkpoint.tensor_files import TYPE_NAMES, all_finite

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


def write_streamed(
    folder: Path,
    tensors: Sequence[StreamedTensor],
    *,
    source: str,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write the tensors as a Hugging Face folder's weights: one file, or shards of `shard_bytes` with an index.

    A tensor is not divided, so a larger one is a shard of its own. `source` is where they come from, for messages.

    Raises:
        UserError: a tensor holds a number that is not finite; the message names it.
    """
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors)
    index: dict[str, str] = {}
    with progress_bar("weights", "B", total=total, shows=progress) as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
            index |= dict.fromkeys((tensor.name for tensor in shard), name)
            _write_file(folder / name, shard, source, bar.update)
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})


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


def _write_file(file: Path, tensors: Sequence[StreamedTensor], source: str, wrote: Callable[[int], object]) -> None:
    entries = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        kind = TYPE_NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (start, end)}
    with file.open("wb") as stream:
        stream.write(file_head(entries))
        for tensor in tensors:
            size = 0
            for block in tensor.blocks():
                if not all_finite(block):
                    raise UserError(f"{source}: {tensor.name} holds numbers that are not finite; the file is broken")
                assert block.dtype == tensor.dtype, tensor.name
                size += stream.write(block.contiguous().view(torch.uint8).numpy().data)
                wrote(block.nbytes)
            assert size == tensor.num_bytes, tensor.name
