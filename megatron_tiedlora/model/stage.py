"""Define one pipeline stage, or the complete model: consecutive layers of the flat list and their shards of adapters.

A stage defines the order of calls, recompute, and the zero gradients that DeepSpeed needs from stages without trained
tensors. DeepSpeed provides the schedules and the messages between stages.

`SupervisedTail` has the layers after the last attention: the last block's output projection and MLP, the final norm,
head and loss. They compute only supervised positions. From the MLP on, the backward pass of the summed loss runs inside
its forward pass. So with every recompute setting, only gradients are saved: d elements per supervised position, and the
gradients of the factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, AdapterSegments
from megatron_tiedlora.adapters.low_rank import SomeTokens
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, TiedAdapter, update_at
from megatron_tiedlora.base.shapes import ATTENTION_TARGETS, MLP_TARGETS, TARGET_NAMES, AttentionKind
from megatron_tiedlora.model.attention import AnyCache, Attention, AttentionContext
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.model.fused_attention import AttentionRoute
from megatron_tiedlora.model.layer_specs import Block, Head, LayerSpec
from megatron_tiedlora.model.regions import Steps, alternate, run_steps
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import TensorParallel, with_adjoint
from megatron_tiedlora.parallel.loss import RowSpan, run_with_early_backward, spans_between


class Attended(NamedTuple):
    """The state of the last block after its attention. Later layers are computed for supervised positions only.

    Attributes:
        hidden: the input of the block, (b, s, d) or (1, b s / p, d).
        attention_output: (b, s, local heads * head_dim).
        update: the update of the block, if it is adapted.
        zero_gradients: tensors on which the loss does not depend, but which must get a gradient (zeros).
    """

    hidden: Tensor
    attention_output: Tensor
    update: LayerUpdate | None = None
    zero_gradients: tuple[Tensor, ...] = ()


class Half(NamedTuple):
    """A micro-batch, or one of the two halves of its rows that are computed alternately.

    Attributes:
        hidden: activations between layers, (b, s, d) or (1, b s / p, d).
        updates: the result of `Stage.read_adapter`.
    """

    hidden: Tensor
    context: AttentionContext
    updates: Mapping[int, LayerUpdate]


Halves = tuple[Attended, Attended]


@dataclass(frozen=True)
class SupervisedTail:
    """The layers after the last block's attention, and the head. The stage owns their modules and parameters."""

    block: Block
    head: Head
    tensor_parallel: TensorParallel

    def logits(self, attended: Attended, *, wanted: Tensor | None = None, segments: AdapterSegments = ()) -> Tensor:
        """Return logits, equal on every rank: (b, s, V), or (b, 1, V) for one position per row, `wanted` (b,) int64.

        With several adapters, there is one position for each of their rows, as an index into all tokens (1, s).
        """
        (size, length), some = attended.attention_output.shape[:2], None
        if wanted is not None:
            assert not self.tensor_parallel.sequence_parallel, "positions are picked from whole sequences"
            rows = torch.arange(size, device=wanted.device) * length + wanted
            spans = tuple(
                RowSpan(number, segment.num_rows) for number, segment in enumerate(segments) if len(segments) > 1
            )
            some = SomeTokens(rows, rows, spans, spans)
        joined, update = self._join(attended, some)
        logits: Tensor = self.head(self.block.add_mlp(joined, self.tensor_parallel, update), self.tensor_parallel)
        return logits.view(size, length, -1) if some is None else logits.transpose(0, 1)

    def loss(self, attended: Attended, labels: Tensor | Supervised) -> Tensor:
        """Return the summed loss over supervised positions. `labels` is (b, s) int64 or a `Supervised`.

        If the positions belong to several adapters, there is one loss per adapter, (adapters,).
        """
        supervised, some = self._supervised(labels)
        joined, update = self._join(attended, some)
        update = {name: linear for name, linear in update.items() if name in MLP_TARGETS}
        pairs = [(linear, slot) for linear in update.values() for slot in (linear.grad_a, linear.grad_f)]
        slots = [slot for _, slot in pairs]

        def summed(joined: Tensor, *slots: Tensor | None) -> Tensor:
            pairs = zip(slots[::2], slots[1::2], strict=True)
            inner = {
                name: linear._replace(grad_a=grad_a, grad_f=grad_f)
                for (name, linear), (grad_a, grad_f) in zip(update.items(), pairs, strict=True)
            }
            hidden = self.block.add_mlp(joined, self.tensor_parallel, inner, recomputes=False)
            return cast(Tensor, self.head(hidden, self.tensor_parallel, supervised))

        inputs = joined, *slots
        needs = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        spans = None
        if some.local_spans:
            of_slots = [slot if slot is None else linear.rows.slot_spans(slot.numel()) for linear, slot in pairs]
            spans = [some.local_spans, *of_slots]
        loss = run_with_early_backward(summed, *inputs, spans=spans) if needs else summed(joined, *slots)
        return _with_zero_gradients(loss, attended.zero_gradients)

    def position_losses(self, attended: Attended, labels: Tensor, segments: AdapterSegments = ()) -> Tensor:
        """Return the loss of each position, (b, s), without a gradient. It is 0 for positions without a label."""
        supervised, some = self._supervised(labels, segments)
        joined, update = self._join(attended, some)
        hidden = self.block.add_mlp(joined, self.tensor_parallel, update, recomputes=False)
        losses = self.head(hidden, self.tensor_parallel, supervised, summed=False)
        spread = torch.zeros(labels.numel(), device=labels.device)
        return spread.index_put_((supervised.rows[supervised.supervised],), losses.float()).view(labels.shape)

    def _supervised(self, labels: Tensor | Supervised, segments: AdapterSegments = ()) -> tuple[Supervised, SomeTokens]:
        """Return the supervised positions, and this rank's tokens at these positions."""
        num_parts, supervised = self.tensor_parallel.sequence_parts, labels
        if not isinstance(supervised, Supervised):
            supervised = find_supervised(supervised, num_parts, segments)
        size, part = len(supervised.rows) // num_parts, self.tensor_parallel.group.rank if num_parts > 1 else 0
        start, stop = part * size, (part + 1) * size
        local_spans = spans_between(supervised.spans, start, stop)
        return supervised, SomeTokens(supervised.rows, supervised.local_rows[start:stop], supervised.spans, local_spans)

    def _join(self, attended: Attended, some: SomeTokens | None) -> tuple[Tensor, LayerUpdate]:
        """Return the input of the last block's MLP, and the block's update, for all tokens or for `some`.

        With `some` the result is (1, m, d) or (1, m / p, d).
        """
        hidden, attention_output, update, _ = attended
        update = update or {}
        if some is not None:
            hidden = hidden.flatten(0, 1).index_select(0, some.local_rows)[None]
            attention_output = attention_output.flatten(0, 1).index_select(0, some.rows)[None]
            update = update_at(update, some)
        return self.block.add_attention(hidden, attention_output, self.tensor_parallel, update), update


def _with_zero_gradients(result: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return `result` with a backward pass that also returns zeros for `tensors`."""
    if not tensors:
        return result
    zeros = _zeros_like(tensors)
    return with_adjoint(lambda result, *_: result.view_as(result), lambda g: (g, *zeros(g)), *(result, *tensors))


def _zeros_like(tensors: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return an adjoint that returns zeros like `tensors`, without keeping references to them."""
    makers = [partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    return lambda _gradient: tuple(make() for make in makers)


class Stage(nn.Module):
    """Consecutive layers of the flat list, called in order, with their shards of the adapters.

    The adapters are read once per call, outside recomputed layers, so their gradients have one autograd path per call.

    DeepSpeed needs a trained tensor, an output with a gradient, and a gradient of the input on every stage. So a stage
    whose engine sees no adapted layer has an `anchor`, one parameter that is always zero. If no earlier stage has an
    adapted layer, the gradient of the input is zeros. Layers before the first adapted layer have no backward pass.

    Attributes:
        adapter_group: the adapters of the stage; None if there are none.
        adapter: the only adapter, if an engine sums, shards and steps its tensors; it is then a submodule.
        can_be_captured: False after a decoding step could not be captured as a CUDA graph.
    """

    anchor: nn.Parameter | None

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        adapters: TiedAdapter | AdapterGroup | None,
        *,
        tensor_parallel: TensorParallel | None = None,
        recompute: str = "none",
        is_engines: bool = False,
    ) -> None:
        """Build the layers of `specs`, and register the adapters.

        Args:
            adapters: the adapters of the stage. A single adapter without a group becomes a submodule.
            is_engines: whether the only adapter of a group becomes a submodule, so that an engine steps it.
        """
        super().__init__()
        self.tensor_parallel = tensor_parallel or TensorParallel()
        self.layers = nn.ModuleDict({str(spec.index): spec.build() for spec in specs})
        self.blocks = [spec.index for spec in specs if spec.kind == "block"]
        self.embedding = next((str(spec.index) for spec in specs if spec.kind == "embedding"), None)
        self.head = next((str(spec.index) for spec in specs if spec.kind == "head"), None)
        head: Any = None if self.head is None else self.layers[self.head]
        if head is not None and not hasattr(head, "frozen"):  # tied embeddings
            if self.embedding is not None:
                embedding: Any = self.layers[self.embedding]
                head.take_weight(embedding.frozen)
            else:
                norm = head.norm.weight
                rows = -(-head.vocab_size // self.tensor_parallel.group.size)
                head.take_weight(FrozenWeight.empty(rows, len(norm), dtype=norm.dtype))
        self.can_be_captured = True
        self.set_recompute(recompute)
        self.hold(adapters, is_engines=is_engines)

    def hold(self, adapters: TiedAdapter | AdapterGroup | None, *, is_engines: bool = False) -> None:
        """Replace the adapters of the stage; see `__init__` for the arguments."""
        if isinstance(adapters, TiedAdapter):
            adapters, is_engines = AdapterGroup({ONLY: adapters}), True
        self.adapter_group = adapters
        self.adapter: TiedAdapter | None = None
        if adapters is not None and is_engines:
            (self.adapter,) = adapters.adapters.values()
        # Engines do not see the tensors of an adapter group, so they need a tensor of their own on every stage.
        anchored = self.adapter_group is not None and (self.adapter is None or not self.adapter.part.layers)
        self.register_parameter("anchor", nn.Parameter(torch.zeros(1)) if anchored else None)

    def set_recompute(self, how: str) -> None:
        """Set what is recomputed from the next call on: `none`, `selective` (gate and up) or `full` (blocks)."""
        self.recompute = how
        for index in self.blocks:
            block: Any = self.layers[str(index)]
            block.recomputes_gate = how == "selective"

    @property
    def tail(self) -> SupervisedTail:
        """Return the layers after the last attention, on the stage that has the head."""
        block: Any = self.layers[str(self.blocks[-1])]
        head: Any = self.layers[str(self.head)]
        return SupervisedTail(block, head, replace(self.tensor_parallel, overlap=False))

    @property
    def attention(self) -> Attention:
        """Return the attention of the first block. Others differ from it only in weights and kind."""
        block: Any = self.layers[str(self.blocks[0])]
        return cast(Attention, block.attention)

    def attention_route(self, device: torch.device, dtype: torch.dtype) -> AttentionRoute:
        """Return the kernel for attention to all tokens in this stage's blocks. The reason names that for windows."""
        windows = [None, *filter(None, (kind.window for kind in self._kinds))]
        whole, *others = (self.attention.route(device, dtype, window) for window in windows)
        in_windows = dict.fromkeys(str(other) for other in others if other != whole)
        return replace(whole, reason="; in windows, ".join([whole.reason, *in_windows]))

    @property
    def _kinds(self) -> list[AttentionKind]:
        blocks: list[Any] = [self.layers[str(index)] for index in self.blocks]
        return list(dict.fromkeys(block.attention.kind for block in blocks))

    @property
    def needs_input_gradient(self) -> bool:
        """Return whether an earlier stage has an adapted layer."""
        adapters = () if self.adapter_group is None else self.adapter_group.adapters.values()
        return any(adapter.config.layers[0] < self.blocks[0] for adapter in adapters)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        labels: Tensor | Supervised | Sequence[Supervised] | None = None,
        *,
        documents: Tensor | None = None,
        token_index: Tensor | None = None,
        segments: AdapterSegments = (),
        prediction: Callable[[], Tensor] | None = None,
    ) -> Tensor | Attended | Halves:
        """Run the forward pass for training; for predictions call `predict`.

        Args:
            inputs: tokens (b, s) int64 if the stage has the embedding, otherwise activations between layers.
            positions: (b, s) int64.
            labels: (b, s) int64, the next token or -100; or the result of `find_supervised`, computed on the host, or
                one result for each of the `num_halves`.
            documents: (b, s) int64, document ids; None if each row is one document.
            token_index: (b, s) int64, see `MicroBatch`; None if there is no dropout.
            segments: the adapters of the micro-batch; by default the only adapter. If there are several, b is 1, and
                `labels` is the result of `find_supervised`.
            prediction: a function that `predict` passes; it is called instead of the forward pass.

        Returns:
            activations between layers. A stage with the head returns the summed loss over supervised positions, or one
            loss per adapter if there are several. Without `labels`, such a stage returns the input of its `tail`, or
            two of them for two halves.
        """
        if prediction is not None:
            return prediction()
        number = self.num_halves(len(positions), segments)
        tensor_parallel = replace(self.tensor_parallel, overlap=number > 1)
        first = inputs if self.embedding is not None or self.needs_input_gradient else inputs.detach()
        dim = int(self.embedding is None and tensor_parallel.sequence_parallel)
        updates = self.read_adapter(segments)
        halves = list[Half]()
        of_rows = (positions, documents, token_index)
        chunks = ((None,) * number if ids is None else ids.chunk(number) for ids in of_rows)
        for own, *rows in zip(first.chunk(number, dim), *chunks, strict=True):
            hidden = own if self.embedding is None else self.embed(own, tensor_parallel)
            own_positions, own_documents, own_index = rows
            own_updates: Mapping[int, LayerUpdate] = updates
            if own_index is not None and self.adapter_group is not None:
                own_updates = self.adapter_group.with_dropout(updates, own_index, segments, tensor_parallel)
            assert own_positions is not None
            owned = [segment._replace(num_rows=segment.num_rows // number) for segment in segments]
            context = self.context(own_positions, hidden.dtype, documents=own_documents, segments=owned)
            halves.append(Half(hidden, context, own_updates))
        del first, own, hidden
        outputs = self.run_blocks(halves, tensor_parallel)
        unused: tuple[Tensor, ...] = () if self.anchor is None else (self.anchor,)
        if self.embedding is None and not self.needs_input_gradient:
            unused += (inputs,)
        unused = unused if torch.is_grad_enabled() else ()
        if not isinstance(outputs[0], Attended):
            joined = outputs[0] if number == 1 else torch.cat(outputs, int(tensor_parallel.sequence_parallel))
            return _with_zero_gradients(joined, unused)
        if unused:  # an empty tensor, so that the pipeline's buffer of outputs does not keep `unused`
            zero = with_adjoint(lambda first, *_: first.new_zeros(0), _zeros_like(unused), *unused)
            outputs[0] = outputs[0]._replace(zero_gradients=(zero,))
        attended = outputs[0] if number == 1 else tuple(outputs)
        return attended if labels is None else self.loss(attended, labels)

    def num_halves(self, num_rows: int, segments: AdapterSegments = ()) -> int:
        """Return 2 if a micro-batch of `num_rows` rows is computed in two halves of its rows, otherwise 1."""
        return 1 + (self.tensor_parallel.overlap and num_rows % 2 == 0 and len(segments) <= 1)

    def loss(
        self, attended: Attended | Halves, labels: Tensor | Supervised | Sequence[Supervised]
    ) -> Tensor:
        """Return the summed loss from the result of `forward`, with the same `labels`."""
        outputs = [attended] if isinstance(attended, Attended) else attended
        of_outputs: Any = labels
        if isinstance(labels, Supervised):
            of_outputs = [labels]
        elif isinstance(labels, Tensor):
            of_outputs = labels.chunk(len(outputs))
        losses = [self.tail.loss(own, of_own) for own, of_own in zip(outputs, of_outputs, strict=True)]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]

    def predict(
        self,
        inputs: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        segments: AdapterSegments = (),
        caches: Sequence[AnyCache] | None = None,
        updates: Mapping[int, LayerUpdate] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return logits (b, s, V), or with `labels` the loss of each position (b, s), which has no gradient.

        Args:
            inputs, positions, labels, documents: as in `forward`.
            segments: as in `forward`.
            caches: one cache per block, for generation; with several adapters, one per block and adapter.
            updates: the result of `read_adapter`, if it was called before.
            wanted: (b,) int64, the position in each row whose logits are returned; the result is then (b, 1, V). With
                several adapters, there is one position for each of their rows, as an index into all s tokens.

        Returns:
            activations between layers if the stage has no head. The loss of a position without a label is 0.
        """

        def logits_or_losses() -> Tensor:
            tensor_parallel = self.tensor_parallel if caches is None else self.tensor_parallel.whole_sequences()
            tensor_parallel = replace(tensor_parallel, overlap=False)
            hidden = inputs if self.embedding is None else self.embed(inputs, tensor_parallel)
            context = self.context(positions, hidden.dtype, documents=documents, caches=caches, segments=segments)
            found = self.read_adapter(segments) if updates is None else updates
            (output,) = self.run_blocks([Half(hidden, context, found)], tensor_parallel, caches=caches)
            if isinstance(output, Tensor):
                return output
            tail = replace(self.tail, tensor_parallel=tensor_parallel)
            if labels is not None:
                return tail.position_losses(output, labels, segments)
            return tail.logits(output, wanted=wanted, segments=segments)

        # The module is called, since engines need its hooks (ZeRO-3 starts a new trace of its parameters there).
        return cast(Tensor, self(inputs, positions, prediction=logits_or_losses))

    def empty_hidden(self, num_rows: int, length: int) -> Tensor:
        """Return uninitialised activations between layers on this rank, for rows (num_rows, length)."""
        qkv, parts = self.attention.qkv, self.tensor_parallel.sequence_parts
        shape = (num_rows, length) if parts == 1 else (1, num_rows * length // parts)
        return qkv.frozen.tensor.new_empty(*shape, qkv.frozen.local_shape[1], dtype=qkv.dtype)

    def read_adapter(self, segments: AdapterSegments = ()) -> dict[int, LayerUpdate]:
        """Return the updates of the stage's adapted layers, by layer. Factors that ranks need in full are gathered.

        Args:
            segments: as in `forward`.
        """
        if self.adapter_group is None:
            return {}
        return self.adapter_group.updates(segments, self.tensor_parallel, dtype=self.attention.qkv.dtype)

    def embed(self, tokens: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        """Return activations between layers from tokens (b, s) int64."""
        return cast(Tensor, self.layers[str(self.embedding)](tokens, tensor_parallel))

    def context(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        *,
        documents: Tensor | None = None,
        caches: Sequence[AnyCache] | None = None,
        segments: AdapterSegments = (),
    ) -> AttentionContext:
        """Return the data that attention needs about the tokens in every block; see `Attention.context`."""
        cache = caches[0] if caches else None
        return self.attention.context(
            positions, dtype, documents=documents, cache=cache, segments=segments, kinds=self._kinds
        )

    def run_blocks(
        self,
        halves: Sequence[Half],
        tensor_parallel: TensorParallel,
        *,
        caches: Sequence[AnyCache] | None = None,
    ) -> list[Any]:
        """Run every block of the stage in order. If the stage has the head, run only the attention of the last block.

        Args:
            halves: the micro-batch, or its two halves, whose steps are then run alternately.

        Returns:
            the activations between layers or the `Attended` of each half.
        """
        if self.recompute != "full":
            return _run([self._steps(half, self.blocks, tensor_parallel, caches) for half in halves])
        outputs: list[Any] = [half.hidden for half in halves]
        # Checkpoints keep what `call` refers to.
        halves = [half._replace(hidden=half.hidden.new_empty(0)) for half in halves]
        for index in self.blocks:

            def call(*hidden: Tensor, index: int = index) -> list[Any]:
                own = [half._replace(hidden=one) for half, one in zip(halves, hidden, strict=True)]
                return _run([self._steps(half, [index], tensor_parallel, caches) for half in own])

            update = halves[0].updates.get(index, {})
            targets = ATTENTION_TARGETS if self._stops(index) else TARGET_NAMES
            linears = [linear for name, linear in update.items() if name in targets]
            slots = [slot for linear in linears for slot in (linear.grad_a, linear.grad_f)]
            if outputs[0].requires_grad or any(slot is not None for slot in slots):
                outputs = checkpoint(call, *outputs, use_reentrant=False)  # saves only the arguments of the call
            else:
                outputs = call(*outputs)
        return outputs

    def _stops(self, index: int) -> bool:
        """Return whether only the attention of this block is run."""
        return self.head is not None and index == self.blocks[-1]

    def _steps(
        self,
        half: Half,
        blocks: Sequence[int],
        tensor_parallel: TensorParallel,
        caches: Sequence[AnyCache] | None,
    ) -> Steps[Tensor | Attended]:
        hidden, addend = half.hidden, None
        for index in blocks:
            block: Any = self.layers[str(index)]
            update, cache = half.updates.get(index), caches[self.blocks.index(index)] if caches else None
            stops = self._stops(index)
            steps = (block.attention if stops else block).steps(
                hidden, addend, half.context, tensor_parallel, update=update, cache=cache
            )
            hidden, addend = yield from steps
            if stops:
                return Attended(hidden, addend, update)
        return hidden if addend is None else hidden + addend


def _run(steps: Sequence[Steps[Any]]) -> list[Any]:
    return [run_steps(steps[0])] if len(steps) == 1 else alternate(*steps)
