"""The layout of a run over its ranks, as plain data. The planners read nothing beside it and a ModelShape.

A run makes one `Layout` from its settings (`RunPlan.layout`). A comparison of layouts makes one for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.batch import PAD_MULTIPLE
from megatron_tiedlora.parallel.grid import Grid

# On a GPU the allocator caches blocks of every requested size. Fewer sizes mean a smaller cache if expandable segments
# are off (docs/performance.md).
GPU_MULTIPLE = 128
# The layers of a rank process so many numbers in a run before compiling pays: a CPU compiles for half a minute at
# first, and saves about a quarter of each step.
LEAST_WORK = 5e9


@dataclass(frozen=True)
class Layout:
    """How a model and its adapters are trained over the ranks.

    Attributes:
        adapters: those that are trained.
        length: the most tokens in a row of a micro-batch.
        rows: the most rows in a micro-batch.
        micro_batches: the most micro-batches of a rank in one step.
        tp_size, pp_size, dp_size: the degrees of tensor, pipeline and data parallelism.
        shards_sequences: whether activations between layers are sharded along the sequence if tp_size is above 1.
        zero_stage: the ZeRO stage, 0 to 3.
        live_parameters: ZeRO-3 stops gathering base weights once it holds more numbers than this.
        overlaps_gathers: whether ZeRO-3 gathers weights while it computes with others.
        dtype: the dtype of the base, and of activations.
        base_format: the storage format of the blocks' linears, a name of `BASE_FORMATS`; None for `dtype`.
        products: "fp8" if what these linears multiply is rounded to fp8 too.
        keep_transposed: whether they keep a transposed copy of their codes, with `products`.
        recompute: "none", "selective" (gate and up) or "full" (whole blocks).
        on_gpu: whether the ranks run on GPUs, where rows are padded further and libraries need memory too.
        compiled: whether kernels are compiled.
        deterministic: whether every sum has a fixed order.
        named: whether the adapters have names, as with --adapters, where one may be alone too.
    """

    adapters: tuple[AdapterConfig, ...]
    length: int
    rows: int = 1
    micro_batches: int = 1
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    shards_sequences: bool = True
    zero_stage: int = 0
    live_parameters: int = 1_000_000_000
    overlaps_gathers: bool = False
    dtype: torch.dtype = torch.bfloat16
    base_format: str | None = None
    products: str | None = None
    keep_transposed: bool = False
    recompute: str = "none"
    on_gpu: bool = False
    compiled: bool = True
    deterministic: bool = False
    named: bool = False

    def __post_init__(self) -> None:
        assert self.named or len(self.adapters) == 1, "several adapters have names"

    @cached_property
    def first_adapted(self) -> int:
        """The first layer of the model that an adapter adapts."""
        return min(adapter.layers[0] for adapter in self.adapters)

    @property
    def engine_steps(self) -> bool:
        """Whether DeepSpeed sums, shards and steps the adapter (`build.steps_by_engine`)."""
        return self.zero_stage > 0 and not self.named

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between layers are sharded along the sequence."""
        return self.shards_sequences and self.tp_size > 1

    @property
    def sequence_parts(self) -> int:
        """The number of shards that activations between layers are cut into along the sequence."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def pad_multiple(self) -> int:
        """Lengths are padded to a multiple of this, so that sequence parallelism can divide them into equal shards.

        It is 8, or 128 on GPUs, for 1, 2, 4 and 8 shards; else the least common multiple. Padding does not change the
        loss.
        """
        return math.lcm(GPU_MULTIPLE if self.on_gpu else PAD_MULTIPLE, self.sequence_parts)


def pays_to_compile(shape: ModelShape, grid: Grid, *, num_tokens: int, least_work: float = LEAST_WORK) -> bool:
    """Whether a run over `num_tokens`, on all ranks together, is long enough to gain from compiled kernels."""
    widths = shape.num_layers * (shape.hidden_size + shape.intermediate_size) / (grid.tp_size * grid.pp_size)
    return num_tokens / grid.dp_size * widths >= least_work
