"""Build a DeepSpeed pipeline stage from the flat list of layers. DeepSpeed provides the 1F1B schedule.

The inputs of a stage are tokens or hidden states, position ids, and document ids if rows are packed. With dropout,
position ids and token indices are one tensor. Stages send hidden states to each other. The last stage divides the
summed loss of supervised tokens by a denominator. For several adapters, its loss is the weighted sum of their losses.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from deepspeed.pipe import PipelineModule
from torch import Tensor

from megatron_tiedlora.adapters.adapter_groups import AdapterSegments
from megatron_tiedlora.engine.engine import make_groups, make_topology, quiet
from megatron_tiedlora.model.layer_specs import LayerSpec
from megatron_tiedlora.model.stage import Halves, Stage
from megatron_tiedlora.model.tail import Attended
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups

BuildStage = Callable[[ParallelGroups, Sequence[LayerSpec]], Stage]


class PipelinedModel(PipelineModule):
    """The stage of the model on this rank, in the form that DeepSpeed's pipeline engine expects."""

    stage: Stage
    groups: ParallelGroups
    segments: AdapterSegments = ()  # the segments of the next forward pass's micro-batch

    def __init__(
        self, specs: Sequence[LayerSpec], stages: Sequence[range], *, grid: Grid, build_stage: BuildStage
    ) -> None:
        """Build the layers of `specs` that belong to this rank's stage.

        Args:
            stages: the layers of each stage.
            build_stage: builds the stage from this rank's process groups and the stage's specs.
        """
        self._stages = stages
        self._parallel_grid = grid
        self._build_stage = build_stage
        with quiet():
            # Lengths differ between micro-batches, so no buffer can be reused for the next one.
            super().__init__(layers=list(specs), topology=make_topology(grid), loss_fn=self._loss, dynamic_shape=True)

    def _partition_layers(self, method: str = "") -> None:
        """Set the bounds of this stage from `stages`. The base class would balance trained parameters, not work."""
        self.parts = [stage.start for stage in self._stages] + [self._stages[-1].stop]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        """Build the stage. The base class calls it once its process groups exist."""
        self.groups = make_groups(self._parallel_grid, self._grid)
        self.stage = self._build_stage(self.groups, self._layer_specs[self._local_start : self._local_stop])

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | Attended | Halves:
        """Return hidden states, or on the last stage the input of the loss. `inputs` may omit document ids."""
        tokens_or_hidden, positions, *documents = inputs
        positions, token_index = positions.unbind() if positions.ndim == 3 else (positions, None)
        output: Tensor | Attended | Halves = self.stage(
            tokens_or_hidden,
            positions,
            documents=documents[0] if documents else None,
            token_index=token_index,
            segments=self.segments,
        )
        return output

    def _loss(self, attended: Attended | Halves, labels: tuple[Any, ...]) -> Tensor:
        supervised, weighted = labels
        return cast(Tensor, weighted(self.stage.loss(attended, supervised)))
