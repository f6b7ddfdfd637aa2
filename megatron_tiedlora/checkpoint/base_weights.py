"""Load base weights from safetensors files into existing parameters, one tensor or slice at a time.

Files are memory-mapped, so reading uses the page cache and no anonymous memory. Benchmarks use random weights instead.
This module also writes checkpoints with random weights, so that memory and speed can be tested without a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_tiedlora.base.files import new_folder, read_json_object, write_json
from megatron_tiedlora.base.messages import UserError, naming, shown
from megatron_tiedlora.base.output_folder import nearest_existing, reject_existing, require_room
from megatron_tiedlora.base.presets import TINY
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint import tensor_files
from megatron_tiedlora.checkpoint.tensor_files import damaged_model
from megatron_tiedlora.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import StoredFormat
from megatron_tiedlora.model.weights import WeightRule, coded_shapes, stored_shapes, weight_rules
from megatron_tiedlora.parallel.frozen_weight import Columns, FrozenWeight
from megatron_tiedlora.parallel.groups import ALONE, RankGroup, all_reduce
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
from megatron_tiedlora.parallel.shard_spec import stream_seed

_LONGEST_NAME = 60  # maximum characters of a file name; model-00001-of-00030.safetensors has half as many
_COMPARED_ROWS = 4096  # number of rows of two tensors that are compared at a time
Access = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def weight_map(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a Hugging Face folder, from its index or its single file. Raise UserError if
    there are no safetensors files, or if the index is not valid or names a missing file."""
    index = folder / tensor_files.INDEX_FILE
    if index.is_file():
        entries = read_json_object(index, kind="a safetensors index").get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
            raise damaged_model(f"{index}: not a safetensors index (weight_map is not a table of tensors and files)")
        for name in sorted(set(entries.values())):
            if name in ("", "..") or Path(name).name != name or len(name) > _LONGEST_NAME:
                raise damaged_model(f"{index}: names a file outside its folder: {shown(name)}")
            if not (folder / name).is_file():
                raise damaged_model(f"{folder / name}: no such file, but {tensor_files.INDEX_FILE} names it")
        return {tensor: folder / name for tensor, name in entries.items()}
    single = folder / tensor_files.SINGLE_FILE
    if not single.is_file():
        other = next((f.name for f in folder.glob("pytorch_model*.bin")), None)
        hint = f"; found {other}: save the model with safe_serialization first" if other else "; give a model's folder"
        raise UserError(f"{folder}: has neither {tensor_files.SINGLE_FILE} nor {tensor_files.INDEX_FILE}{hint}")
    return dict.fromkeys(sorted(tensor_files.read_header(single).entries), single)


class WeightFiles(ExitStack):
    """The safetensors files of a folder. A file is memory-mapped when one of its tensors is first read.

    Attributes:
        file_of: the file of each tensor, by the tensor's name.
        header: a cached function that returns the header of a file (`read_header`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.file_of = weight_map(folder)
        self.header = cache(tensor_files.read_header)
        self._readers: dict[Path, Any] = {}

    def reader(self, file: Path) -> Any:
        """Return the opened file, which stays open. Raise UserError if the file is truncated or damaged."""
        if file not in self._readers:
            self.header(file)  # first, because it limits the size of a header
            try:
                self._readers[file] = self.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: the file cannot be mapped
                raise UserError(f"{file}: not a complete safetensors file ({error}); copy it again") from None
        return self._readers[file]

    def stored(self, name: str) -> Any:
        """Return the stored tensor `name`, from which slices can be read, or None if it does not exist. Raise UserError
        if only the index names it."""
        file = self.file_of.get(name)
        try:
            return None if file is None else self.reader(file).get_slice(name)
        except SafetensorError as error:
            raise damaged_model(f"{file}: {error}, but the index names it") from None


class BaseWeights(WeightFiles):
    """A base checkpoint. Its constructor checks the names and shapes of the tensors against the model's name table.

    Attributes:
        rules: the name table: a `WeightRule` for each weight of the model.
        others: the names of the tensors outside of the text tower, such as those of a vision tower.
        bytes_read: the number of bytes of stored tensors that this process has read so far.
    """

    kind: ClassVar[str] = "base weights"

    def __init__(self, folder: Path, shape: ModelShape, stored: StoredFormat | None = None) -> None:
        """Open the files of `folder`. `stored` is the storage format of the blocks' linears if they are quantised."""
        super().__init__(folder)
        self.rules = weight_rules(shape)
        own = shape.block.source.removesuffix("layers.{index}"), shape.head.sources[0].module
        self.others = [name for name in self.file_of if not name.startswith(own)]
        self.bytes_read = 0
        self._stored = None if stored is None else tensor_files.StoredWeights(stored, self.stored)
        self._quantised = {} if stored is None else coded_shapes(shape)
        embedding, head = (f"{linear.sources[0].module}.weight" for linear in (shape.embedding, shape.head))
        names = {*stored_shapes(self.rules), head}
        if stored is not None:
            names |= self.file_of.keys()
        for file in sorted({self.file_of[name] for name in names if name in self.file_of}):
            self.reader(file)
        self._check()
        if shape.tied_embeddings and head in self.file_of:
            self._check_tied_head(head, embedding)

    def _check(self) -> None:
        for name, expected in stored_shapes(self.rules).items():
            if name not in self.file_of:
                raise damaged_model(f"{self.folder}: tensor {name} is missing from the safetensors files")
            file = self.file_of[name]
            stored = self.stored(name)
            if self._stored is not None and name in self._quantised:
                with naming(str(file)):
                    self._stored.check(name, expected)
                continue
            shape = tuple(stored.get_shape())
            if shape != expected:
                raise damaged_model(f"{file}: {name} has shape {shape}, but config.json requires {expected}")
            if stored.get_dtype() not in tensor_files.FLOAT_TYPES:
                said = f"{name} is {stored.get_dtype()}, but only linears of blocks may be quantised"
                raise UserError(f"{file}: {said}; give a model in which it is bf16, fp16 or fp32")

    def _check_tied_head(self, head: str, embedding: str) -> None:
        """Raise UserError if a stored head differs from the embedding. transformers would then not tie the two."""
        ours, theirs = self.stored(head), self.stored(embedding)
        same = ours.get_shape() == theirs.get_shape()
        for start in range(0, ours.get_shape()[0] if same else 0, _COMPARED_ROWS):
            rows = slice(start, start + _COMPARED_ROWS)
            same = same and bool(torch.equal(ours[rows], theirs[rows]))
        if not same:
            said = f"{self.folder / 'config.json'}: tie_word_embeddings is true, but {head} differs from {embedding}"
            raise UserError(f"{said}, so transformers would not tie them; set it to false")

    def sample(self, name: str) -> torch.Tensor:
        """Return up to a few thousand values of the stored tensor `name`, at positions that depend only on its shape.

        The values are used for comparisons and are not counted in `bytes_read`.
        """
        if self._stored is not None and name in self._quantised:  # sample its codes and its scales
            return torch.cat([self._sample(part).float() for part in self._stored.names(name)])
        return self._sample(name)

    def _sample(self, name: str) -> torch.Tensor:
        file = self.file_of[name]
        return tensor_files.read_runs(file, self.header(file), name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the stored tensor `name`, which must not be quantised."""
        return tensor_files.FLOAT_TYPES[self.stored(name).get_dtype()]

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> torch.Tensor:
        """Return the tensor `name`, or a slice along `dim`, in its stored dtype, or in fp32 if it is quantised."""
        if self._stored is not None and name in self._quantised:
            rows, columns = (part or slice(None), slice(None)) if dim == 0 else (slice(None), part or slice(None))
            with naming(str(self.file_of[name])):
                values, num_bytes = self._stored.values(name, self._quantised[name], rows)
            self.bytes_read += num_bytes
            return values[:, columns]
        stored = self.stored(name)
        index: Any = ... if part is None else (slice(None),) * dim + (part,)
        tensor: torch.Tensor = stored[index]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def fill(self, rule: WeightRule, target: FrozenWeight, group: RankGroup = ALONE) -> None:
        """Read this rank's shard of one weight into `target`, block by block. `group` is the tensor-parallel group.
        Raise UserError if a weight has a zero by which the backward pass divides, or if it cannot be quantised."""
        dim = rule.spec.dim or 0
        offset = 0
        for stored, block in zip(rule.parts, rule.spec.block_slices(group.rank, group.size), strict=True):
            size, start = block.stop - block.start, block.start + (stored.start if dim == 0 else 0)
            part, columns = slice(start, start + size), None
            if dim == 1 and group.size > 1:
                largest = partial(all_reduce, group=group, op=torch.distributed.ReduceOp.MAX)
                columns = Columns(part.start, part.stop, rule.shape[1], largest)
                part = target.columns_to_read(columns)
            if self._stored is not None and stored.name in self._quantised and isinstance(target, QuantisedWeight):
                self._copy_codes(stored.name, target, part, dim, start=offset, columns=columns)
                offset += size
                continue
            values = self.read(stored.name, part, dim)
            if rule.divides and not (values + rule.offset).all():
                divisor = f"{rule.offset:g} + {stored.name}" if rule.offset else stored.name
                why = f"{divisor} has a zero, and training would divide by it; use a different model"
                raise UserError(f"{self.file_of[stored.name]}: {why}")
            try:
                target.load(values, dim=dim, start=offset, columns=columns)
            except ValueError as error:
                why = f"{stored.name} has {error}, which cannot be quantised; remove --base"
                raise UserError(f"{self.file_of[stored.name]}: {why}") from None
            offset += size
        padding = list(target.local_shape)
        padding[dim] -= offset
        if padding[dim]:
            target.load(torch.zeros(padding), dim=dim, start=offset)

    def _copy_codes(
        self, name: str, target: QuantisedWeight, part: slice, dim: int, *, start: int, columns: Columns | None
    ) -> None:
        """Copy the codes and scales of a quantised tensor into `target`, without dequantising them."""
        assert self._stored is not None and target.storage.name == self._stored.kind.base_format
        shape = self._quantised[name]
        rows, read = (part, slice(0, shape[1])) if dim == 0 else (slice(0, shape[0]), part)
        codes, scales, num_bytes = self._stored.read(name, shape, rows, read)
        self.bytes_read += num_bytes
        try:
            target.load_stored(codes, scales, start=start, columns=columns)
        except ValueError as error:
            raise damaged_model(f"{self.file_of[name]}: {name} has {error}") from None


def load_base_weights(
    weights: "BaseWeights | RandomWeights",
    targets: Mapping[str, FrozenWeight],
    rules: Sequence[WeightRule] | None = None,
    *,
    access: Access = nullcontext,
    group: RankGroup = ALONE,
    reads: bool = True,
    progress: bool = False,
) -> None:
    """Load this rank's shard of every frozen weight in `targets`.

    Args:
        targets: the weights, by the names of their rules (see `frozen_weights`).
        rules: the name table of the stage; None for all rules of `weights`.
        access: returns a context in which a weight's parameters can be written (it gathers them under ZeRO-3).
        group: the tensor-parallel group, which also agrees on the scales of sharded rows.
        reads: whether this rank reads the weights; False on ranks that only call `access`.
        progress: whether to show a progress bar.
    """
    mine = [rule for rule in (weights.rules if rules is None else rules) if rule.name in targets]
    with torch.no_grad():
        for rule in progress_bar(weights.kind, "tensor", mine, shows=progress):
            target = targets[rule.name]
            with access(list(target.parameters.values())):
                if reads:
                    weights.fill(rule, target, group)


@dataclass(frozen=True)
class RandomWeights:
    """Random weights for the name table `rules`, used instead of a checkpoint. Each rank draws its shards on its own
    device, so the values depend on the parallel configuration."""

    rules: Sequence[WeightRule]
    seed: int = 0

    kind: ClassVar[str] = "random weights"

    def fill(self, rule: WeightRule, target: FrozenWeight, group: RankGroup = ALONE) -> None:
        """Fill `target` with random values for this rank's shard of one weight."""
        name = rule.hf_names[0]
        seed = stream_seed(self.seed, f"{name}/{group.rank}")  # equal for copies of a tied embedding
        target.load(draw_(target.empty_values(), name=name, full_shape=rule.shape, seed=seed, offset=rule.offset))


def draw_(
    target: torch.Tensor, *, name: str, full_shape: Sequence[int], seed: int, offset: float = 0.0
) -> torch.Tensor:
    """Fill `target` with random values that preserve the scale of activations, and return it.

    `target` can be a shard of a tensor of `full_shape`. Biases (by their stored name) are zero, and other vectors
    (norms) plus `offset` are one. Matrices have a normal distribution with variance 1 / (last dimension of
    `full_shape`)."""
    if len(full_shape) == 1:
        return target.fill_(0.0 if name.endswith(".bias") else 1.0 - offset)
    generator = torch.Generator(target.device).manual_seed(seed)
    return target.normal_(0.0, full_shape[-1] ** -0.5, generator=generator)


# Checkpoints of random weights ----------------------------------------------------------------------------------------


def write_random_model(values: Mapping[str, Any], output: Path, *, name: str, seed: int) -> None:
    """Write config.json, shards and index of a model into `output`, and for the preset `tiny` also a tokenizer. Raise
    UserError if `output` exists, or if the disk has too little space.

    Args:
        values: the content of config.json.
        name: the model's name in messages.
    """
    reject_existing(output, flag=f"--output {output}")

    def drawn(tensor: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        yield draw_(empty, name=tensor, full_shape=shape, seed=stream_seed(seed, tensor), offset=offsets[tensor])

    rules = weight_rules(shape_from_hf(values, source=name))
    offsets, shapes = {part.name: rule.offset for rule in rules for part in rule.parts}, stored_shapes(rules).items()
    files = tensor_files.sharded(
        [tensor_files.StreamedTensor(one, torch.bfloat16, shape, partial(drawn, one, shape)) for one, shape in shapes]
    )
    needed = sum(file.value_bytes for file in files)
    require_room(nearest_existing(output.parent), needed, output=output)
    with new_folder(output) as folder:
        tensor_files.write_files(folder, files, bar=name)
        if not (kinds := values.get("architectures")):  # names of model classes; transformers may not be installed
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            kinds = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]]
        write_json(folder / "config.json", {**values, "architectures": kinds, "dtype": "bfloat16"})
        if name == TINY:
            save_tokenizer(byte_tokenizer(values["max_position_embeddings"]), folder)
