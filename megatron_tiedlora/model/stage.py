"""Define one pipeline stage, or the complete model: consecutive layers of the flat list and their shards of adapters.

A stage defines the order of calls, recompute, and the zero gradients that DeepSpeed needs from stages without trained
tensors. DeepSpeed provides the schedules and the messages between stages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, AdapterSegments
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, TiedAdapter
from megatron_tiedlora.base.shapes import ATTENTION_TARGETS, TARGET_NAMES, AttentionKind
from megatron_tiedlora.model.attention import AnyCache, Attention, AttentionContext
from megatron_tiedlora.model.batch import Supervised
from megatron_tiedlora.model.fused_attention import AttentionRoute
from megatron_tiedlora.model.layer_specs import LayerSpec
from megatron_tiedlora.model.regions import Steps, alternate, run_steps
from megatron_tiedlora.model.tail import Attended, SupervisedTail, with_zero_gradients, zeros_like
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import TensorParallel, with_adjoint


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
            return with_zero_gradients(joined, unused)
        if unused:  # an empty tensor, so that the pipeline's buffer of outputs does not keep `unused`
            zero = with_adjoint(lambda first, *_: first.new_zeros(0), zeros_like(unused), *unused)
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
        num_top: int | None = None,
        report: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Return logits (b, s, V), or with `labels` the loss of each position (b, s), which has no gradient.

        Args:
            inputs, positions, labels, documents: as in `forward`.
            segments: as in `forward`.
            caches: one cache per block, for generation; with several adapters, one per block and adapter.
            updates: the result of `read_adapter`, if it was called before.
            wanted: (n,) int64, indices into the b s tokens, one for each row of an adapter. Only their logits are
                returned, (n, 1, V).
            num_top, report: the number for, and a function that gets, the `label_logprobs` of each position. The result
                is then logits.

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
                numbers = tail.at_positions(output, labels, segments, num_top=num_top)
                if report is None:
                    return numbers
                report(numbers)
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
