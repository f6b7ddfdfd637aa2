"""Load a base model with an adapter, without an engine: the full model or one rank's shard, to check exports and to
generate. A model that is too large for the memory is run one layer at a time. This module also computes merged weights
while the base is read: W' = D(W) + B' A', added in fp32.

Usually D(W) is W. For a merge onto a quantised base, D(W) is W quantised to the base's storage format and dequantised.
A merge writes the values that are read here, and the check of a merged folder reads them again. The last bits of a
matmul can depend on its number of rows, so merge and check use the same `row_blocks`.

A linear module of a transformers model in memory can also compute the update separately from its weight. A and B are
then not copied per layer: all adapted layers share one pair.

    z = W x + B' A' x    with    A' = diag(u) A,    B' = the module's rows of (alpha / r) diag(v) B

A module of a fused target (q, k and v; gate and up) uses its own rows of B and v. A', B' and the update are computed in
each forward pass, in the adapter's dtype. The results are equal to the results of the exported PEFT LoRA.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard, LayerUpdate, TiedAdapter
from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import BASE_FORMATS, ModelShape
from megatron_tiedlora.checkpoint.base_identity import is_plain
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.native_adapter import AdaptedTensor, NativeAdapter, changed_tensors
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.data.task import Task
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import WeightRule, coded_shapes, stage_weight_rules, stored_shapes, weight_rules
from megatron_tiedlora.parallel.agreement import num_differing
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, WeightMaker, frozen_weights
from megatron_tiedlora.parallel.groups import ALONE, Grid, ParallelGroups, TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.quantise import quantised_rows
from megatron_tiedlora.parallel.quantised_weight import weight_maker
from megatron_tiedlora.runtime.launch_env import has_bf16_instructions

BLOCK_ELEMENTS = 2**19  # elements per block of rows: 2 MiB in fp32 plus 2 MiB for the update fit in the caches
_FEWEST_ROWS = 16  # minimum rows per block, because a matmul with few rows sums in a different order

ReadRows = Callable[[str, slice], Tensor]  # returns rows of the stored tensor with this name


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of rows, of about `BLOCK_ELEMENTS` elements each, that together cover a tensor of this shape.

    Each slice has at least 16 rows, unless the tensor has fewer.
    """
    num_rows, width = shape[0], max(torch.Size(shape[1:]).numel(), 1)
    size = max(BLOCK_ELEMENTS // width // _FEWEST_ROWS, 1) * _FEWEST_ROWS
    start = 0
    while start < num_rows:
        stop = num_rows if num_rows - start < size + _FEWEST_ROWS else start + size
        yield slice(start, stop)
        start = stop


def merged_rows(rows: Tensor, a: Tensor, b_rows: Tensor) -> Tensor:
    """Return rows (n, in) of W' from the same rows of W, A' (r, in), and the same rows (n, r) of B'. The result is in
    fp32, or in fp64 if W is in fp64."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide, copy=True).add_(b_rows @ a)


class MergedWeights(BaseWeights):
    """A base checkpoint that is read with an adapter merged into it. `changed` has the names of the stored tensors
    whose values the merge changes.

    Only the factors of the last tensor are cached, so that memory does not grow with the number of layers. So all rows
    of a tensor should be read before the next tensor is read."""

    def __init__(self, source: ModelSource, adapter: NativeAdapter | None, *, base_format: str | None = None) -> None:
        """Open the files of `source`.

        Args:
            adapter: the adapter to merge; None if only `base_format` changes the values.
            base_format: the storage format to which the base is quantised before the merge; None: it is not quantised.
        """
        super().__init__(source.weights_folder(), source.shape, source.stored)
        self._adapter, self._base_format = adapter, None if base_format is None else BASE_FORMATS[base_format]
        self._adapted = {} if adapter is None else changed_tensors(adapter.config, source.shape)
        self._requantised = frozenset(() if base_format is None else coded_shapes(source.shape))
        self.changed = self._requantised.union(self._adapted)
        self._last: tuple[str, Tensor, Tensor] | None = None  # name, A' (r, in), and the tensor's rows of B'

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> Tensor:
        """Return the tensor `name` of the merged model, or a slice of it along `dim`. The result is in fp32 or fp64 if
        the merge changes the tensor, and otherwise in the dtype that `BaseWeights.read` returns."""
        values = super().read(name, part, dim)
        if name in self._requantised:
            assert self._base_format is not None and dim == 0, "scales are those of whole rows"
            values = quantised_rows(values, self._base_format)
        if name not in self._adapted:
            return values
        if self._last is None or self._last[0] != name:
            assert self._adapter is not None
            self._last = name, *self._adapted[name].factors(self._adapter.config, self._adapter.state)
        _, a, b = self._last
        if part is not None:
            a, b = (a, b[part]) if dim == 0 else (a[:, part], b)
        return merged_rows(values, a, b)

    def read_base(self, name: str, part: slice) -> Tensor:
        """Return some rows of the tensor `name` without the merge."""
        return super().read(name, part)


# A model in memory ----------------------------------------------------------------------------------------------------


def find_places(shape: ModelShape, config: AdapterConfig) -> Mapping[str, AdaptedTensor]:
    """Return the stored tensors that an adapter changes, by the name of their module in the transformers model."""
    return {name.removesuffix(".weight"): tensor for name, tensor in changed_tensors(config, shape).items()}


def with_update(z: Tensor, x: Tensor, adapter: TiedAdapter, place: AdaptedTensor) -> Tensor:
    """Return z + B' A' x in the dtype of z, from z = W x, (..., out), and x, (..., in)."""
    a, b = (factor.to(x.device) for factor in place.factors(adapter.config, adapter.factors()))
    return (z + linear(linear(x.to(a.dtype), a), b)).to(z.dtype)


def check_whole(weight: Tensor, place: AdaptedTensor) -> None:
    """Raise UserError if a weight is quantised, offloaded or sharded, so that it cannot be changed in place."""
    shape = stored_shapes([place.rule])[place.stored]
    if not is_plain(weight) or tuple(weight.shape) != tuple(shape):
        raise UserError(f"{place.stored} is quantised, offloaded or sharded; run `tiedlora merge` instead")


@torch.no_grad()
def merge_(weight: Tensor, adapter: TiedAdapter, place: AdaptedTensor, *, sign: int = 1) -> None:
    """Add sign B' A' to W in place. The result is bitwise equal to a merged checkpoint. Raise UserError if W is
    quantised, offloaded or sharded."""
    check_whole(weight, place)
    a, b = (factor.to(weight.device) for factor in place.factors(adapter.config, adapter.factors()))
    for rows in row_blocks(tuple(weight.shape)):
        weight[rows] = merged_rows(weight[rows], a, sign * b[rows])


# Loading --------------------------------------------------------------------------------------------------------------


def resolve_dtype(given: str | None, task: Task, *, on_gpu: bool) -> str:
    """Return the value of --dtype, or its default value for the task on this host: bf16 or fp32."""
    slow = task.fp32_on_slow_cpus and not on_gpu and not has_bf16_instructions()
    return given or ("fp32" if slow else "bf16")


def describe_dtype(given: str | None, resolved: str) -> str:
    """Return the dtype as text for a log line, with the reason if fp32 is the default on this CPU."""
    by_default = given is None and resolved == "fp32"
    return f"{resolved} (this CPU has no bf16 instructions)" if by_default else resolved


def check_same_dtype(resolved: str) -> None:
    """Raise UserError on every rank if the default of --dtype differs between hosts."""
    if differing := num_differing(resolved):
        said = f"--dtype: the default of {count_text(differing, 'rank')} differs from rank 0's"
        raise UserError(f"{said}, because their CPUs differ; give --dtype fp32")


def load_model(
    source: ModelSource,
    adapter: NativeAdapter | Mapping[str, NativeAdapter] | None,
    *,
    dtype: torch.dtype,
    base_format: str | None = None,
    device: torch.device | str = "cpu",
    grid: Grid | None = None,
    make_weight: WeightMaker | None = None,
    groups: ParallelGroups | None = None,
    stages: Sequence[range] | None = None,
    merged: bool = False,
    kernels: Kernels = EAGER,
    progress: bool = False,
) -> Stage:
    """Return this rank's shard of the model in evaluation mode, with the base in `dtype` and the adapter in fp32.

    This function does not check that the adapter was trained on this base (see `convert.inputs.check_base`). Raise
    UserError if weights are missing or have the wrong shape.

    Args:
        adapter: one adapter, or several by name, which the stage then computes in the same forward pass.
        base_format: the storage format of the blocks' linears; None for `dtype`.
        make_weight: a function that creates the weights of the blocks' linears; it replaces `base_format`.
        grid, groups, stages: the parallel layout, its process groups and the layers per stage; by default one process.
        merged: whether to merge the adapter into the weights (added in fp32, cast once).
        kernels: the kernels of the layers, eager or compiled.
        progress: whether to show a progress bar.
    """
    grid, groups = grid or Grid(0, 1), groups or ParallelGroups()
    shape = source.shape
    into_weights = adapter if merged else None
    assert not isinstance(into_weights, Mapping), "only one adapter can be merged"
    assert into_weights is None or base_format is None, "a merged weight would be quantised again"
    with MergedWeights(source, into_weights) as weights:
        layers = range(shape.num_layers + 2) if stages is None else stages[grid.pp_rank]
        part: TiedAdapter | AdapterGroup | None = None
        if isinstance(adapter, Mapping):
            part = AdapterGroup({name: adapter_shard(own, layers, grid, device) for name, own in adapter.items()})
        elif adapter is not None and not merged:
            part = adapter_shard(adapter, layers, grid, device)
        make_weight = make_weight or weight_maker(base_format)
        specs = layer_specs(shape, dtype=dtype, tp_size=grid.tp_size, kernels=kernels, make_weight=make_weight)
        with torch.device(device):
            model = Stage(specs[layers.start : layers.stop], part, tensor_parallel=TensorParallel(groups.tensor, False))
        load_base_weights(
            weights,
            frozen_weights(model),
            stage_weight_rules(shape, has_embedding=model.embedding is not None),
            group=groups.tensor,
            progress=progress,
        )
    return model.eval()


def adapter_shard(adapter: NativeAdapter, layers: range, grid: Grid, device: torch.device | str) -> TiedAdapter:
    """Return this rank's shard of an adapter for a stage with these layers, on `device`."""
    part = AdapterShard.of_stage(adapter.config, layers, grid.tp_rank, grid.tp_size)
    return TiedAdapter(part).to(device).load_full(adapter.state)


# One layer at a time --------------------------------------------------------------------------------------------------
#
# Logits and losses of complete models are computed in the memory of one layer. A layer is built, loaded with the
# weights of each model in turn, run on all rows, and freed. Only the embedding rows of the tokens are loaded. Logits
# are computed with some rows of the head at a time. For a loss, batches are processed together if their activations fit
# in a fraction of the host's free memory. The weights are then read only once for these batches.

_HEAD_ELEMENTS = 2**24  # elements of the head that are loaded at a time for logits; 64 MiB in fp32
_SHARE = 0.25  # the fraction of the host's free memory that stored activations may use
Inputs = tuple[Tensor, Tensor]  # tokens (b, s) and position ids (b, s)
# A function that reads rows of a model's stored tensors (in any float dtype), and for each named result the adapter
# with which the result is computed, or None for a result of the base alone.
Weights = tuple[ReadRows, Mapping[str, NativeAdapter | None]]


@torch.no_grad()
def layerwise_logits(
    shape: ModelShape, models: Sequence[Weights], tokens: Tensor, *, dtype: torch.dtype, progress: bool = False
) -> dict[str, Tensor]:
    """Return {name in `models`: fp32 logits (b, s, V)}. All models have this shape, and layers compute in `dtype`."""
    layers = _Layers(shape, dtype, torch.device("cpu"))
    size = max(_HEAD_ELEMENTS // shape.hidden_size, 1)
    logits: dict[str, list[Tensor]] = {}
    with progress_bar("logits", "layer", total=shape.num_layers + 2, shows=progress) as bar:
        hidden = layers.hidden(models, [(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))], bar)
        for read, adapters in models:
            for start in range(0, shape.vocab_size, size):
                head = layers.head(read, start, min(start + size, shape.vocab_size))
                for name in adapters:
                    logits.setdefault(name, []).append(head(hidden[name][0], TensorParallel()).float())
        bar.update()
    return {name: torch.cat(parts, dim=-1) for name, parts in logits.items()}


@torch.no_grad()
def layerwise_loss(
    shape: ModelShape,
    read: ReadRows,
    adapter: NativeAdapter,
    batches: Iterable[MicroBatch],
    *,
    dtype: torch.dtype,
    device: torch.device,
    between: Callable[[], object] = lambda: None,
) -> float:
    """Return the summed loss over the supervised positions of `batches`, which must not be packed.

    Args:
        read: reads rows of a stored tensor, in any float dtype.
        dtype: the dtype in which layers compute.
        between: called before each block; it may raise an exception to end the computation.
    """
    layers, total = _Layers(shape, dtype, device, between), 0.0
    # Batches are processed together if their activations fit into memory, and otherwise one at a time.
    most, of_token = _SHARE * psutil.virtual_memory().available, shape.hidden_size * dtype.itemsize
    for group in filled((batch, batch.tokens.numel() * of_token, most) for batch in batches):
        with progress_bar("loss", "layer", total=shape.num_layers + 2) as bar:
            inputs = [(batch.tokens, batch.positions) for batch in group]
            hidden = layers.hidden([(read, {ONLY: adapter})], inputs, bar)[ONLY]
            head = layers.head(read, 0, shape.vocab_size)
            for batch, states in zip(group, hidden, strict=True):
                supervised = batch.supervised()
                rows = states.flatten(0, 1)[supervised.rows][None].to(device)
                total += head(rows, TensorParallel(), supervised.moved(lambda tensor: tensor.to(device))).sum().item()
    return total


@dataclass(frozen=True)
class _Layers:
    """The layers of a model of this shape, which compute in `dtype` on `device`.

    Attributes:
        between: called before each block.
    """

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    between: Callable[[], object] = lambda: None

    def hidden(self, models: Sequence[Weights], inputs: Sequence[Inputs], bar: Any) -> dict[str, list[Tensor]]:
        """Return {name in `models`: the outputs (b, s, d) of the last block for each of `inputs`}, on the CPU."""
        hidden: dict[str, list[Tensor]] = {}
        for read, adapters in models:
            embedded = self._embedded(read, inputs)
            hidden |= {name: list(embedded) for name in adapters}
        bar.update()
        rules = weight_rules(self.shape)
        for spec in layer_specs(self.shape, dtype=self.dtype)[1:-1]:
            self.between()
            with self.device:
                stage = Stage([spec], None)
            for read, adapters in models:
                _fill(stage, (rule for rule in rules if rule.layer == spec.index), read)
                for name, adapter in adapters.items():
                    updates: dict[int, LayerUpdate] = {}
                    if adapter is not None and spec.index in adapter.config.layers:
                        of_layer = range(spec.index, spec.index + 1)
                        (update,) = adapter_shard(adapter, of_layer, Grid(0, 1), self.device)(ALONE, dtype=self.dtype)
                        updates[spec.index] = update
                    for index, (_, positions) in enumerate(inputs):
                        states = hidden[name][index].to(self.device)
                        found = stage.predict(states, positions.to(self.device), updates=updates)
                        hidden[name][index] = found.cpu()
            del stage  # before the next layer is built
            bar.update()
        return hidden

    def head(self, read: ReadRows, start: int, stop: int) -> Any:
        """Return the last layer with rows `start` to `stop - 1` of the head's weight."""
        last = self.shape.num_layers + 1
        with self.device:
            head: Any = layer_specs(self._with_vocabulary(stop - start), dtype=self.dtype)[-1].build()
            if self.shape.tied_embeddings:
                head.take_weight(FrozenWeight.empty(stop - start, self.shape.hidden_size, dtype=self.dtype))
        norms = (rule for rule in weight_rules(self.shape) if rule.layer == last and rule.linear is None)
        _fill(nn.ModuleDict({"layers": nn.ModuleDict({str(last): head})}), norms, read)
        for rows in row_blocks((stop - start, self.shape.hidden_size)):
            values = read(self._stored_name(last), slice(start + rows.start, start + rows.stop))
            head.frozen.load(values, start=rows.start)
        return head

    def _embedded(self, read: ReadRows, inputs: Sequence[Inputs]) -> list[Tensor]:
        """Return the embeddings (b, s, d) of each of `inputs`. Only the embedding rows of their tokens are loaded."""
        ids = torch.cat([tokens.flatten() for tokens, _ in inputs]).unique()
        with self.device:
            embedding: Any = layer_specs(self._with_vocabulary(len(ids)), dtype=self.dtype)[0].build()
        offset = 0
        for rows in row_blocks((self.shape.vocab_size, self.shape.hidden_size)):
            here = ids[(ids >= rows.start) & (ids < rows.stop)]
            if len(here):
                embedding.frozen.load(read(self._stored_name(0), rows)[here - rows.start], start=offset)
                offset += len(here)
        renumbered = (torch.searchsorted(ids, tokens).to(self.device) for tokens, _ in inputs)
        return [embedding(tokens, TensorParallel()).cpu() for tokens in renumbered]

    def _with_vocabulary(self, size: int) -> ModelShape:
        """Return the model's shape with a vocabulary of `size` tokens."""
        embedding, head = (replace(linear, blocks=(size,)) for linear in (self.shape.embedding, self.shape.head))
        return replace(self.shape, embedding=embedding, head=head)

    def _stored_name(self, layer: int) -> str:
        """Return the name of the stored tensor of the embedding (layer 0) or the head."""
        linear = self.shape.embedding if layer == 0 or self.shape.tied_embeddings else self.shape.head
        return f"{linear.sources[0].module}.weight"


def _fill(module: nn.Module, rules: Iterable[WeightRule], read: ReadRows) -> None:
    """Read the weights of `rules` into the module some rows at a time, since a full tensor in fp32 would be large."""
    targets = frozen_weights(module)
    for rule in rules:
        offset = 0
        for part in rule.parts:
            for rows in row_blocks((part.size, *part.shape[1:])):
                values = read(part.name, slice(part.start + rows.start, part.start + rows.stop))
                targets[rule.name].load(values, start=offset)
                offset += len(values)
