"""Count the work of a rank in the layers of a stage by running the layers on tensors without data.

A trace covers the embedding, one block, or the last block with the head and the loss. It runs the modules, autograd
functions and recomputation of a real run, except for the modules that `counting` replaces.

Counts are affine functions of the sizes of a micro-batch, so a few traces determine the counts for all sizes
(`Tracer.at`). The allocated bytes after each operation are affine functions, too. The peak is their maximum.
"""

import gc
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup, AdapterSegment
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard, LayerUpdate, LinearUpdate, TiedAdapter
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model import attention, fused_attention
from megatron_tiedlora.model.batch import Documents, Supervised
from megatron_tiedlora.model.layer_specs import HEAD_ROWS, layer_specs
from megatron_tiedlora.model.stage import Half, Stage
from megatron_tiedlora.model.tail import Attended
from megatron_tiedlora.parallel import frozen_weight, loss
from megatron_tiedlora.parallel.groups import TensorParallel, with_adjoint
from megatron_tiedlora.planning import counting

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _remembers(method: _Method) -> _Method:
    """Return the method with a cache for its results.

    The caller's gradient mode does not affect the results. The garbage collector is off during a call, because
    destructors of some objects, such as DeepSpeed's engines, run operations that would be counted.
    """

    @wraps(method)
    def compute(*arguments: Any, **keywords: Any) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return method(*arguments, **keywords)
        finally:
            if collects:
                gc.enable()

    return cast("_Method", cache(compute))


class Sizes(NamedTuple):
    """The sizes of a micro-batch.

    Attributes:
        tokens, after: for each adapter, the number of tokens, and of positions computed after the last attention.
        supervised, at_once: the number of rows of logits, and how many of them are in memory at the same time.
        halves: 2 if the micro-batch is computed in two equal halves, alternately.
    """

    tokens: tuple[int, ...]
    after: tuple[int, ...]
    supervised: int
    at_once: int = HEAD_ROWS
    halves: int = 1


class Trace(NamedTuple):
    """The counted work of a block for one micro-batch. The last block includes the head and the loss.

    Attributes:
        forward, backward: the counts of both passes.
        moments: the allocated memory after each operation of both passes.
        saved: the bytes that autograd saves, without the factors A and F and without indices.
        kept: the bytes that stay allocated between the passes, without A and F, but with arguments for recomputation.
        gradients: the bytes of the gradients of A and F after the backward pass.
        saves_attention: 1 if the saved tensors of attention stay allocated between the passes, else 0.
        saved_factors, kept_factors: the copies of A and F that are saved or kept, as pairs of a target and a letter.
    """

    forward: Mapping[Hashable, float]
    backward: Mapping[Hashable, float]
    moments: tuple[Sequence[counting.Moment], ...]
    saved: float
    kept: float
    gradients: float
    saves_attention: int
    saved_factors: frozenset[tuple[str, str]]
    kept_factors: frozenset[tuple[str, str]]

    @property
    def numbers(self) -> list[float]:
        """All values that are affine functions of the sizes, in a fixed order."""
        of_moments = (number for moments in self.moments for one in moments for number in (one.alive, one.numbers))
        return [*self.forward.values(), *self.backward.values(), *of_moments, self.saved, self.kept, self.gradients]


@dataclass(frozen=True)
class AdapterReading:
    """The counts of both passes when A and F are computed from the adapters, and the memory of A and F.

    Attributes:
        factors: the memory address and the bytes of each copied A or F, by layer, target and letter.
    """

    forward: Mapping[Hashable, float]
    backward: Mapping[Hashable, float]
    factors: Mapping[tuple[int, str, str], tuple[int, int]]


@dataclass(frozen=True)
class Kind:
    """The properties of a block that determine its work, in addition to the sizes of the micro-batch.

    Attributes:
        adapters: for each adapter with tokens in the micro-batch, its config if it adapts the block, else None.
        earlier: whether the block's input needs a gradient.
        ends: whether the head follows the block.
        rotates: whether the block applies rotary position embeddings.
        window: the window of the block's attention. It determines the FLOPs of attention, but not the trace.
    """

    adapters: tuple[AdapterConfig | None, ...]
    earlier: bool
    ends: bool = False
    rotates: bool = True
    window: int | None = None


class Tracer:
    """A tracer of the layers of a model, as they run on rank 0 of a tensor-parallel group."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        dtype: torch.dtype,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        on_gpu: bool = False,
        rounds: bool = False,
    ) -> None:
        """Create the layers without data.

        Args:
            on_gpu: selects the attention kernel that is traced.
            rounds: whether the matmuls of the blocks are in FP8, so that kernels round their inputs.
        """
        self.shape, self.dtype, self._on_gpu, self._rounds = shape, dtype, on_gpu, rounds
        self._counts = counting.Counts()
        group = counting.CountingGroup(None, 0, tp_size, self._counts)
        self.tensor_parallel = TensorParallel(group, sequence_parallel)
        with torch.device(counting.META):
            kernels = counting.counted_kernels(self._counts)
            self._specs = layer_specs(shape, dtype=dtype, tp_size=tp_size, kernels=kernels)

    @_remembers
    def _stage(self, first: int, stop: int | None) -> Stage:
        """Return a stage with the entries [first, stop) of the flat list of layers."""
        with torch.device(counting.META):
            stage = Stage(list(self._specs[first:stop]), None, tensor_parallel=self.tensor_parallel)
        for name, module in stage.named_modules():
            if isinstance(weight := getattr(module, "frozen", None), frozen_weight.FrozenWeight):
                is_head = name.endswith(str(stage.head))
                module.frozen = counting.CountedWeight(
                    weight.tensor, self._counts, is_head=is_head, rounds=self._rounds
                )
        return stage

    def at(self, kind: Kind, sizes: Sizes, *, recompute: str) -> Trace:
        """Return the trace of a block for a micro-batch of these sizes.

        With one adapter, all values are affine functions of `_features`, so one trace per feature is enough. With
        several adapters, each combination of sizes is traced.
        """
        kind = replace(kind, window=None)  # blocks with different windows have one trace
        if len(sizes.tokens) > 1:
            return self.trace(kind, sizes, recompute=recompute)
        first, coefficients = self._solved(kind, recompute, sizes.halves)
        values = iter((_features(kind, sizes) @ coefficients).tolist())
        forward, backward = ({key: next(values) for key in counts} for counts in (first.forward, first.backward))
        moments = tuple(
            [counting.Moment(next(values), moment.kernel, next(values)) for moment in some] for some in first.moments
        )
        saved, kept, gradients = values
        return first._replace(
            forward=forward, backward=backward, moments=moments, saved=saved, kept=kept, gradients=gradients
        )

    @_remembers
    def _solved(self, kind: Kind, recompute: str, halves: int) -> tuple[Trace, Any]:
        """Return the first trace, and the coefficients of the affine functions as an array (features, values)."""
        one = 8 * self.tensor_parallel.group.size * halves
        given = [(2, 1, 8, 8), (4, 1, 8, 8)]
        if kind.ends:
            given = [(4, 4, 16, 8), (8, 4, 16, 8), (4, 8, 16, 8), (4, 4, 24, 8), (4, 4, 32, 16), (4, 4, 16, 16)]
        sizes = [
            Sizes((tokens * one,), (after * one,), rows * halves, at_once, halves)
            for tokens, after, rows, at_once in given
        ]
        traces = [self.trace(kind, some, recompute=recompute) for some in sizes]
        features = np.array([_features(kind, some) for some in sizes])
        return traces[0], np.linalg.solve(features, np.array([trace.numbers for trace in traces], dtype=float))

    @_remembers
    def embedding(self, tokens: int) -> dict[Hashable, float]:
        """Return the counts of the embedding layer for this number of tokens."""
        stage = self._stage(0, 1)
        self._counts.restart()
        with self._counts:
            stage.embed(torch.empty(1, tokens, dtype=torch.int64, device=counting.META), self.tensor_parallel)
        return dict(self._counts.found)

    @_remembers
    def reading(self, parts: tuple[AdapterShard, ...]) -> AdapterReading:
        """Return the work of computing A and F of all layers of a stage from the adapters, once per micro-batch."""
        with torch.device(counting.META):
            adapter_group = AdapterGroup({str(number): TiedAdapter(part) for number, part in enumerate(parts)})
        kept = {parameter.untyped_storage()._cdata for _, parameter in adapter_group.named_parameters()}
        segments = tuple(
            AdapterSegment(name, 1, 8 * self.tensor_parallel.group.size) for name in adapter_group.adapters
        )
        counts = self._counts
        counts.restart()
        updates = adapter_group.updates(segments, self.tensor_parallel, dtype=self.dtype)
        forward, slots = dict(counts.found), list[torch.Tensor]()
        counts.found.clear()
        factors = {}
        for layer, update in updates.items():
            for name, linear in update.items():
                slots += [tensor for tensor in (linear.grad_a, linear.grad_f) if tensor is not None]
                for letter, factor in (("A", linear.a), ("F", linear.f)):
                    assert factor is not None, "an adapted linear has factors"
                    storage = factor.untyped_storage()
                    if storage._cdata not in kept:
                        factors[layer, name, letter] = storage._cdata, storage.nbytes()
        if slots:
            torch.autograd.backward(slots, [torch.empty_like(tensor) for tensor in slots])
        return AdapterReading(forward, dict(counts.found), factors)

    @_remembers
    def trace(self, kind: Kind, sizes: Sizes, *, recompute: str = "none") -> Trace:
        """Return the trace of one block. With `kind.ends`, the trace includes the head and the loss."""
        last = self.shape.num_layers
        alike = (block for block in range(1, last) if (self.shape.kind_of(block).rope is not None) == kind.rotates)
        index = last if kind.ends else next(alike, last)
        stage = self._stage(index, None if kind.ends else index + 1)
        stage.set_recompute(recompute)
        gradients, saved = list[torch.Tensor](), dict[int, int]()
        anchor = torch.empty(1, dtype=self.dtype, requires_grad=True, device=counting.META)
        updates, factors = self._updates(kind, index, sizes, anchor, gradients)
        tokens, parallel = sum(sizes.tokens) // sizes.halves, replace(self.tensor_parallel, overlap=sizes.halves > 1)
        context = self._context(stage, tokens)
        size = (1, tokens // self.tensor_parallel.sequence_parts, self.shape.hidden_size)
        counts = self._counts
        counts.restart()

        def save(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with counts:
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                # The input from the previous block; its gradient is not kept.
                begin = anchor if kind.earlier else anchor.detach()
                halves = [
                    Half(with_adjoint(lambda one: one.new_empty(size), lambda _gradient: None, begin), context, updates)
                    for _ in range(sizes.halves)
                ]
                outputs = stage.run_blocks(halves, parallel)
                del halves
                if isinstance(outputs[0], Attended):
                    head: Any = stage.layers[str(stage.head)]
                    head.rows_at_once = sizes.at_once
                    outputs = [stage.tail.loss(outputs.pop(0), _supervised(sizes)) for _ in range(sizes.halves)]
            del updates
            kept = counts.alive - sum(output.untyped_storage().nbytes() for output in outputs)
            kept_factors = {name: storage for name, factor in factors.items() if (storage := factor()) is not None}
            saved_factors = frozenset(name for name, storage in kept_factors.items() if storage._cdata in saved)
            saved_bytes = sum(size for key, size in saved.items() if key in counts.storages)
            attends = sum(sums() is not None for sums in counts.attended)
            forward, middle = dict(counts.found), len(counts.moments)
            counts.found.clear()
            if outputs[0].requires_grad:
                end = torch.stack([output.sum() for output in outputs]).sum() if kind.ends else _end(outputs)
                del outputs
                end.backward()
        moments, of_factors = (counts.moments[:middle], counts.moments[middle:]), sum(one.nbytes for one in gradients)
        both = saved_factors, frozenset(kept_factors)
        return Trace(forward, dict(counts.found), moments, saved_bytes, kept, of_factors, attends, *both)

    def _updates(
        self, kind: Kind, index: int, sizes: Sizes, anchor: torch.Tensor, kept: list[torch.Tensor]
    ) -> tuple[dict[int, LayerUpdate], dict[tuple[str, str], weakref.ref[torch.UntypedStorage]]]:
        """Return the block's updates, and references to A and F. The backward pass adds their gradients to `kept`."""

        def gradient_slot(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            return with_adjoint(lambda one: one.new_empty(1, dtype=dtype).expand(shape), kept.append, anchor)

        like = next(filter(None, kind.adapters), None)  # its shapes are used for adapters that do not adapt the block
        if like is None:
            return {}, {}
        adapter_group, group = dict[str, TiedAdapter](), self.tensor_parallel.group
        with torch.device(counting.META):
            for number, config in enumerate(kind.adapters):
                layers = () if config is None else (index,)
                part = AdapterShard(replace(config or like, layers=(index,)), layers, group.rank, group.size)
                adapter_group[str(number)] = TiedAdapter(part)
            segments = [AdapterSegment(name, 1, some) for name, some in zip(adapter_group, sizes.tokens, strict=True)]
            updates = AdapterGroup(adapter_group).updates(segments, self.tensor_parallel, dtype=self.dtype)
        found, factors = dict[str, LinearUpdate](), {}
        for name, linear in updates[index].items():
            assert linear.a is not None and linear.f is not None, "an adapted linear has factors"
            a, f = linear.a.detach().clone(), linear.f.detach().clone()
            for letter, factor in (("A", a), ("F", f)):
                factors[name, letter] = weakref.ref(factor.untyped_storage())
            grad_a, grad_f = (
                t if t is None else gradient_slot(t.shape, t.dtype) for t in (linear.grad_a, linear.grad_f)
            )
            found[name] = linear._replace(a=a, f=f, grad_a=grad_a, grad_f=grad_f)
        return {index: found}, factors

    def _context(self, stage: Stage, tokens: int) -> attention.AttentionContext:
        positions = torch.empty(1, tokens, dtype=torch.int64, device=counting.META)
        rope = stage.attention.qkv.rope
        tables = {} if rope is None else {rope: attention.rotation_table(positions, self.shape.heads, self.dtype)}

        def by_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
            if self.dtype == torch.float32:  # the memory-efficient kernel needs keys and values for every query head
                group = query.shape[1] // key.shape[1]
                key, value = (heads.repeat_interleave(group, dim=1) if group > 1 else heads for heads in (key, value))
            output: torch.Tensor = counting.CountedAttention.apply(query, key, value, self._counts)
            return output

        def by_tiles(*heads: torch.Tensor) -> torch.Tensor:
            rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in heads)
            output: torch.Tensor = counting.CountedAttention.apply(*rows, self._counts)
            return output.flatten(1)[None]

        given: dict[str, Any] = {"documents": Documents([0, tokens], positions[0, :2], tokens), "scores": None}
        on_gpu = partial(fused_attention.attend_within, **given, attend=by_token)
        function = on_gpu if self._on_gpu else by_tiles
        return attention.AttentionContext(positions, tables, attend={stage.attention.kind.window: function})


def _end(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a scalar from which the backward pass starts. The gradients of `outputs` exist only in this pass."""
    shapes = [output.shape for output in outputs]
    return with_adjoint(
        lambda one, *_: one.new_empty(()), lambda gradient: tuple(gradient.new_empty(s) for s in shapes), *outputs
    )


def _supervised(sizes: Sizes) -> Supervised:
    given = sum(sizes.after) // sizes.halves, sizes.supervised // sizes.halves
    rows, chosen = (torch.empty(size, dtype=torch.int64, device=counting.META) for size in given)
    if len(sizes.tokens) == 1:
        return Supervised(rows, rows, chosen, chosen)
    spans = tuple(loss.RowSpan(number, size) for number, size in enumerate(sizes.after))
    # The assignment of rows of logits to adapters does not matter if each adapter has some rows.
    edges = [len(chosen) * sum(sizes.after[:number]) // len(rows) for number in range(len(spans) + 1)]
    labelled = tuple(loss.RowSpan(number, stop - start) for number, (start, stop) in enumerate(pairwise(edges)))
    return Supervised(rows, rows, chosen, chosen, spans, labelled)


def _features(kind: Kind, sizes: Sizes) -> list[float]:
    """Return the values of which all counts are affine functions.

    They are the constant 1 and the tokens. With the head, the positions after the last attention and the rows of logits
    follow. The last values are the number of chunks of these rows, and the rows of the first chunk.
    """
    (tokens,), (after,), rows, at_once, halves = sizes
    if not kind.ends:
        return [1.0, tokens]
    of_half = rows // halves
    return [1.0, tokens, after, rows, halves * -(-of_half // at_once), halves * min(of_half, at_once)]
