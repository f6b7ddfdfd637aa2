"""Which ranks of a layout send to each other over the network, and how long their messages take.

Over a ring of n ranks an all-gather or reduce-scatter of B bytes takes B (n - 1) / n over the bandwidth, and an
all-reduce twice that. A group that spans nodes has the network cards of its ranks in a node together, at most the
bandwidth inside a node. Each message takes `message` seconds beside its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.traffic import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.machines import Machine

RANKS_PER_NODE = 8  # where nobody says it
_RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # how often a ring carries (n - 1) / n of the bytes


class Term(NamedTuple):
    """One term of a step's time: an amount at a rate.

    Attributes:
        purpose: a field of `step_time.Seconds`.
        label: what it is, for `--why`.
        rate: of `unit` per second; 0 if it costs only `fixed` seconds.
        fixed: seconds beside those of the amount.
    """

    purpose: str
    label: str
    amount: float
    rate: float
    unit: str
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds that it takes."""
        return (self.amount / self.rate if self.rate else 0.0) + self.fixed


@dataclass(frozen=True)
class Link:
    """What carries the messages of a group.

    Attributes:
        size: ranks of the group.
        num_nodes: nodes that they are in.
        per_node: ranks of it in a node.
    """

    size: int
    num_nodes: int
    per_node: int

    def bandwidth(self, machine: Machine) -> float:
        """Bytes per second of each rank, in one direction."""
        inside = machine["node_bandwidth"] * machine["node_link"]
        if self.num_nodes == 1:
            return inside
        return min(inside, self.per_node * machine["network_bandwidth"] * machine["network_link"])

    def term(self, kind: str, count: int, num_bytes: float, machine: Machine, *, purpose: str) -> Term:
        """The time of `count` messages of `num_bytes` together, one after another."""
        carried = num_bytes * _RINGS[kind] * (self.size - 1) / self.size if kind in _RINGS else num_bytes
        label, fixed = f"{kind}, {count_text(int(count), 'message')}", count * machine["message"]
        return Term(purpose, label, carried, self.bandwidth(machine), "B", fixed)


@dataclass(frozen=True)
class Links:
    """The links of all groups of a layout on nodes of `ranks_per_node` ranks."""

    layout: Layout
    ranks_per_node: int

    @cached_property
    def _by_group(self) -> dict[str, Link]:
        layout = self.layout
        tp, pp, dp = layout.tp_size, layout.pp_size, layout.dp_size
        grid = Grid(0, layout.world_size, tp_size=tp, pp_size=pp)
        sizes = {
            TENSOR: (1, 1, tp),
            DATA: (1, dp, 1),
            TIED: (pp, dp, 1),
            STAGE: (1, dp, tp),
            MODEL: (pp, 1, tp),
            WORLD: (pp, dp, tp),
        }
        return {
            group: self._link(
                grid.rank_of(pp_rank=p, dp_rank=d, tp_rank=t) for p in range(a) for d in range(b) for t in range(c)
            )
            for group, (a, b, c) in sizes.items()
        }

    def _link(self, ranks: Iterable[int]) -> Link:
        nodes = [rank // self.ranks_per_node for rank in ranks]
        return Link(len(nodes), len(set(nodes)), max(map(nodes.count, set(nodes))))

    def __getitem__(self, group: str) -> Link:
        """The link of a group, but of the pipeline."""
        return self._by_group[group]

    def to_next(self, stage: int) -> Link:
        """The link from a stage to the next one: over the network if one of its ranks sends to another node."""
        width, per_node = self.layout.tp_size * self.layout.dp_size, self.ranks_per_node
        first = stage * width
        crosses = any(rank // per_node != (rank + width) // per_node for rank in (first, first + width - 1))
        return Link(2, 1 + crosses, 1)

    def terms(self, traffic: Traffic, machine: Machine, *, purpose: str) -> list[Term]:
        """The time of all messages but those to other stages."""
        return [
            self[group].term(kind, traffic.messages[group, kind], size, machine, purpose=purpose)
            for (group, kind), size in traffic.bytes.items()
            if group != PIPELINE and self[group].size > 1
        ]
