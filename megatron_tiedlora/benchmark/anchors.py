"""Constants of a machine that only a step of a run's own engine shows.

    block        seconds of a step of many tiny layers - of one, over the passes through them
    step         seconds of a step of one tiny layer beside its passes
    instruction  what is left of a step of two tiny stages
    context      what an idle process on a CPU holds: the anonymous memory after these steps
    elementwise  what is left of a step of two layers of the model's own widths

A tiny layer is so narrow that its matmuls and messages of bytes take nearly no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.benchmark.layout import start
from megatron_tiedlora.benchmark.plan import plan_benchmark
from megatron_tiedlora.benchmark.timing import idle_bytes
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.presets import is_preset
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.planning.machines import Constant, Machine
from megatron_tiedlora.planning.step_time import Seconds
from megatron_tiedlora.training.checks import GUARDED_STEPS

_LAYERS = 33  # so many that the launches of their passes stand out of the noise of a busy machine
_LENGTH = 64
_MICRO_BATCHES = 8  # of the step of two stages
_TINY_REPEATS, _REPEATS = 20, 5
_TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}
_UNKNOWN = ("block", "step", "instruction")
_NOTHING = Constant(0.0, "not measured yet")


@dataclass(frozen=True)
class _MeasuredStep:
    """A step that was measured: its seconds, and what is planned for them without what is unknown."""

    seconds: float
    planned: Seconds

    @property
    def left(self) -> float:
        """The seconds that no known constant explains."""
        return max(0.0, self.seconds - self.planned.total)


@dataclass(frozen=True)
class Anchors:
    """Measures these constants of the machine with this model. All ranks call each method together.

    Attributes:
        source_text: the source of a constant, from what was done.
    """

    source: ModelSource
    device: torch.device
    source_text: Callable[[str], str]

    def alone(self, machine: Machine) -> Machine:
        """The machine with what tiny steps show; before anything else is measured, so that the process is idle."""
        unknown = _with(machine, dict.fromkeys(_UNKNOWN, _NOTHING))
        one, many = (_tiny_step(unknown, num_layers=number) for number in (1, _LAYERS))
        block = max(0.0, many.seconds - one.seconds) / (2 * (_LAYERS - 1))
        found = {
            "block": self._constant(block, f"a step of {_LAYERS} tiny layers beside one of 1"),
            "step": self._constant(max(0.0, one.left - 2 * block), "a step of 1 tiny layer beside its passes"),
        }
        if self.device.type == "cpu" and (idle := idle_bytes()):
            found["context"] = self._constant(float(idle), "anonymous memory of an idle rank")
        return _with(machine, found)

    def beside(self, machine: Machine, *, tokens: int) -> Machine:
        """The machine with what is left of steps that all other constants explain in part.

        Args:
            tokens: of a micro-batch of the model's own widths.
        """
        if distributed.get_world_size() % 2 == 0:
            known = _with(machine, {"instruction": _NOTHING})
            two = _tiny_step(known, num_layers=2, pipeline_parallel=2, micro_batches=_MICRO_BATCHES)
            left = two.left / (2 * (_MICRO_BATCHES + 1))  # passes on the longest path through two stages
            words = "a step of 2 tiny stages beside its passes and messages"
            machine = _with(machine, {"instruction": self._constant(left, words)})
        own = _own_step(_with(machine, {"elementwise": Constant(1.0, "as copies")}), self.source, tokens=tokens)
        moved = own.planned.elementwise
        words = f"a step of 2 layers of {self.source.name} over {tokens:,} tokens, beside what other constants explain"
        words = words if own.left else f"as copies, as nothing was left of {words}"
        return _with(machine, {"elementwise": self._constant(moved / (moved + own.left), words)})

    def _constant(self, value: float, words: str) -> Constant:
        return Constant(value, self.source_text(words))


def _with(machine: Machine, constants: dict[str, Constant]) -> Machine:
    return machine.changed(constants, name=machine.name, title=machine.title)


def _tiny_step(machine: Machine, *, num_layers: int, **more: Any) -> _MeasuredStep:
    shape = shape_from_hf({**_TINY, "num_hidden_layers": num_layers}, source="tiny")
    settings = {"what": "layout", "rows": 1, "length": _LENGTH, "ds_config": "zero0.json", **more}
    return _measured(machine, settings, repeats=_TINY_REPEATS, source=ModelSource("tiny", None, shape))


def _own_step(machine: Machine, source: ModelSource, *, tokens: int) -> _MeasuredStep:
    settings = {"what": "layout", "model": source.name, "num_layers": 2, "rows": 1, "length": tokens}
    settings["random_weights"] = not is_preset(source.name)
    settings["ds_config"] = "zero0.json"
    return _measured(machine, settings, repeats=_REPEATS)


def _measured(
    machine: Machine, values: dict[str, Any], *, repeats: int, source: ModelSource | None = None
) -> _MeasuredStep:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    settings = validate_settings(values, BenchSettings)
    plan = plan_benchmark(settings, rank=rank, world_size=world_size, source=source)
    run = start(plan, settings)
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + repeats)]
    seconds = [run.seconds_of(step) for step in steps][GUARDED_STEPS:]
    return _MeasuredStep(median(seconds), run.planned_seconds(steps[-1], machine))
