"""Measures the constants of a machine: speeds of matmuls, attention, copies, dequantisation, and messages of two sizes.

    share = FLOP / seconds / peak        message = seconds of an all-reduce or a gather of one page
    bandwidth = bytes over a ring / (seconds of a large message - message)

Each time is the median of as many repetitions as fit in the time limit. On a CPU, few and many tokens are timed, to
separate computation from the time to read weights or queries. A constant that cannot be measured keeps the value and
source of a preset. On a GPU this is the preset of the same GPU or else of the H100; on a CPU it is the CPU preset.

Some constants are measured with steps of the training engine:

    block        (seconds of a step of many tiny layers - seconds of a step of one) / (passes through the other layers)
    step         seconds of a step of one tiny layer without its passes
    instruction  unexplained (measured minus planned) seconds of a step of two tiny stages
    context      anonymous memory of an idle process on a CPU after these steps
    elementwise  unexplained seconds of a step of two layers with the model's widths

A tiny layer is so narrow that its matmuls and the bytes of its messages take almost no time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import distributed

from megatron_tiedlora.base.presets import is_preset, small_llama
from megatron_tiedlora.base.shapes import BASE_NAMES, FP8_CAPABILITY
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.model import batch, families, fused_attention
from megatron_tiedlora.model.cpu_attention import Scores, TiledRows, attend_by_tiles, find_query_tiles, tile_size
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.quantised_weight import weight_maker
from megatron_tiedlora.planning.machines import CPU, DEFAULT_GPU, GPUS, Constant, Machine, known_gpu
from megatron_tiedlora.runtime.process_group import ranks_by_host
from megatron_tiedlora.selfcheck.step_bench import MeasuredStep, measured_step
from megatron_tiedlora.selfcheck.timing import idle_bytes
from megatron_tiedlora.training.throughput import measured_peak, timed

TOKENS = {"cpu": 512, "cuda": 4096}  # of a matmul and of an attention call
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes
_MESSAGES = {"cpu": (2**12, 2**24), "cuda": (2**12, 2**28)}  # bytes of a rank's shard
_FEWER = 8  # the second measurement has this many times fewer tokens
_MOST = 200  # the maximum number of repetitions
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_LAYERS = 33  # so many layers that their launches are visible in the noise of a busy machine
_LENGTH = 64
_MICRO_BATCHES = 8  # in the step of two stages
_TINY_REPEATS, _REPEATS = 20, 5
_UNKNOWN = ("block", "step", "instruction")
_NOTHING = Constant(0.0, "not measured yet")


def measure_machine(source: ModelSource, device: torch.device, *, seconds: float, tokens: int | None = None) -> Machine:
    """Measure and return the constants of this machine. If several ranks measure together, rank 0's result is used.

    Args:
        source: the model whose sizes of linears and attention heads are used.
        seconds: the approximate time that the measurement takes.
        tokens: number of tokens of a matmul and of an attention call.
    """
    measure = _Measure(source, device, tokens or min(TOKENS[device.type], source.shape.limit.tokens), seconds)
    start = measure.start
    if device.type == "cuda":  # before a communicator exists, because a plan counts its memory separately
        start = start.changed({"context": measure.context()})
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    own = {"name": "measured", "title": _title(device), "capability": capability}
    return measure.beside(measure.alone(start).changed(dict(measure.constants()), **own))


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class _Measure:
    source: ModelSource
    device: torch.device
    tokens: int
    seconds: float

    @cached_property
    def preset(self) -> Machine | None:
        """The preset of this GPU; None for a CPU, or if the GPU has no preset."""
        if self.device.type == "cpu":
            return None
        name = known_gpu(torch.cuda.get_device_name(self.device))
        return None if name is None else GPUS[name]

    @cached_property
    def _kernels(self) -> Kernels:
        """Return the kernels of a long run, with which weights are dequantised and inputs are rounded."""
        return EAGER if self.device.type == "cpu" else Kernels().compiled(static_widths=True)

    @property
    def start(self) -> Machine:
        """The preset whose values are used for constants that are not measured."""
        return CPU if self.device.type == "cpu" else self.preset or GPUS[DEFAULT_GPU]

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """Yield the name and value of each constant that can be measured without an engine."""
        on_gpu = self.device.type == "cuda"
        size, words = psutil.virtual_memory().total, "memory of the machine"
        if on_gpu:
            size, words = torch.cuda.get_device_properties(self.device).total_memory, "as PyTorch reports it"
        yield "memory", self._constant(float(size), words)
        has_fp8 = not on_gpu or torch.cuda.get_device_capability(self.device) >= FP8_CAPABILITY
        share = self.seconds / (4 + has_fp8 + 1 + len(BASE_NAMES) + 2)  # seconds for each of the following measurements
        for name in _DTYPES:
            yield from self._rates(name, share)
        if has_fp8:
            yield from self._fp8(share)
        if self.preset is None:
            yield "bandwidth", self._copies(share)
        for name in BASE_NAMES:
            yield f"dequantise.{name}", self._dequantised(name, share)
        yield from self._messages(2 * share)

    def _constant(self, value: float, words: str) -> Constant:
        return Constant(value, f"measured on {_title(self.device)}, torch {torch.__version__}: {words}")

    def _share(self, rate: float, peak: Constant, what: str) -> Constant:
        return self._constant(rate / peak.value, f"{what} of {self.source.name} over {self.tokens:,} tokens")

    def _time(self, step: Callable[[], object], seconds: float, group: Any = None) -> float:
        """Return the median time of calls that fit in `seconds`. All ranks of `group` make the same number of calls."""
        step()
        taken = [timed(step, self.device)]
        first = torch.tensor(taken, device=self.device)
        if group is not None:
            distributed.all_reduce(first, op=distributed.ReduceOp.MAX, group=group)
        number = min(_MOST, int(seconds / max(float(first), 1e-9)))
        return median([*taken, *(timed(step, self.device) for _ in range(number - 1))])

    def _random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def context(self) -> Constant:
        """Return the GPU memory in bytes that is used outside of PyTorch's allocator."""
        torch.zeros(1, device=self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free - torch.cuda.memory_reserved(self.device)
        return self._constant(float(used), "used beside PyTorch's allocator, of other processes too")

    def _rates(self, name: str, seconds: float) -> Iterator[tuple[str, Constant]]:
        """Yield the peak, its fractions for matmuls and attention, and how fast a CPU reads weights and queries."""
        dtype, width, weights = _DTYPES[name], self.source.shape.heads.rows[0], 2 * self.source.shape.block.num_weights
        matmuls = self._two_terms(partial(self._matmuls, dtype), 1, seconds)
        attention = self._two_terms(partial(self._attention, dtype), 2, seconds)
        flops, attention_flops = 2 * self.tokens * weights, 6 * self.tokens**2 * width
        if self.preset is None:  # a busy machine can be slower during the square matmuls than during the others
            rates = (measured_peak(self.device, dtype), flops / matmuls[0], attention_flops / attention[0])
            peak = self._constant(max(rates), "the fastest matmul")
        else:
            peak = self.preset.constants[f"peak.{name}"]
        yield f"peak.{name}", peak
        taken, read = _limited(*matmuls, flops / peak.value)
        yield f"matmul.{name}", self._share(flops / taken, peak, "matmuls")
        yield f"weights.{name}", self._read(weights, read, "matmuls")
        taken, read = _limited(*attention, attention_flops / peak.value)
        yield f"attention.{name}", self._share(attention_flops / taken, peak, "attention, forward and back")
        yield f"queries.{name}", self._read(3 * self.tokens * width, read, "attention")

    def _two_terms(self, measure: Callable[[int, float], float], power: int, seconds: float) -> tuple[float, float]:
        """Return the seconds of all tokens, and of these the term that grows as tokens^(power - 1), not tokens^power.

        A CPU needs this term for reading. It is 0 on a GPU, and below 0 or above all seconds where noise hides it.
        """
        many = measure(self.tokens, seconds / 2)
        if self.device.type != "cpu":
            return many, 0.0
        tokens = max(1, self.tokens // _FEWER)
        ratio = self.tokens / tokens
        return many, (measure(tokens, seconds / 2) * ratio**power - many) / (ratio - 1)

    def _read(self, numbers: float, seconds: float, what: str) -> Constant:
        """Return the elements read per second, computed from the `seconds` that reading adds to computation."""
        if not seconds:
            return Constant(0.0, "while it computes")
        words = f"{what} of {self.source.name} over {self.tokens // _FEWER} and {self.tokens:,} tokens"
        return self._constant(numbers / seconds, words)

    def _matmuls(
        self,
        dtype: torch.dtype,
        tokens: int,
        seconds: float,
        base_format: str | None = None,
        products: str | None = None,
    ) -> float:
        """Return the seconds of all linears of a transformer block, for the forward pass and the input gradients."""
        taken, linears = 0.0, self.source.shape.block.linears
        for linear in linears:
            with self.device:
                # On a GPU, transposing has its own term in the plan, so it is not measured here.
                made = weight_maker(
                    base_format, products=products, keep_transposed=products is not None, kernels=self._kernels
                )
                weight = made(linear.out_size, linear.in_size, dtype=dtype)
            weight.load(self._random(linear.out_size, linear.in_size, dtype=dtype))
            x, grad_y = (self._random(tokens, size, dtype=dtype) for size in (linear.in_size, linear.out_size))
            for step in (partial(weight.times_transposed, x), partial(weight.times, grad_y)):
                taken += self._time(step, seconds / len(linears) / 2)
        return taken

    def _attention(self, dtype: torch.dtype, tokens: int, seconds: float) -> float:
        """Return the seconds of the forward and backward passes of attention over one sample."""
        heads = self.source.shape.heads
        query, key, value = (
            self._random(1, num, tokens, heads.dim, dtype=dtype).requires_grad_()
            for num in (heads.num, heads.num_kv, heads.num_kv)
        )
        forward: Callable[[], torch.Tensor]
        if self.device.type == "cpu":
            tiles = find_query_tiles(None, tokens, size=tile_size(heads.num, heads.num_kv))
            rows = [TiledRows(1, tokens, tiles)]
            forward = partial(attend_by_tiles, query, key, value, rows, Scores(heads.scale), EAGER)
        else:
            documents = batch.whole_rows(1, tokens, self.device)
            attend = fused_attention.choose_attention(self.device, dtype, heads.dim).attend
            assert attend is not None, "a GPU has a kernel"
            forward = partial(fused_attention.attend_within, query, key, value, documents, Scores(heads.scale), attend)
        grad = torch.ones_like(forward())
        return self._time(lambda: forward().backward(grad), seconds)

    def _fp8(self, seconds: float) -> Iterator[tuple[str, Constant]]:
        taken = self._matmuls(torch.bfloat16, self.tokens, seconds, "fp8", "fp8")
        rate = 4 * self.tokens * self.source.shape.block.num_weights / taken
        peak = self._constant(rate, "fp8 matmuls") if self.preset is None else self.preset.constants["peak.fp8"]
        yield "peak.fp8", peak
        yield "matmul.fp8", self._share(rate, peak, "fp8 matmuls, with rounding")
        for name in ("round.forward", "round.backward"):
            yield name, self._constant(0.0, "in the seconds of fp8 matmuls")

    def _copies(self, seconds: float) -> Constant:
        size = _COPIED[self.device.type]
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return self._constant(2 * size / self._time(lambda: target.copy_(source), seconds), "copies")

    def _dequantised(self, name: str, seconds: float) -> Constant:
        linear = self.source.shape.block.output
        with self.device:
            weight = weight_maker(name, kernels=self._kernels)(linear.out_size, linear.in_size, dtype=torch.bfloat16)
        weight.load(self._random(linear.out_size, linear.in_size, dtype=torch.bfloat16))
        x = self._random(1, linear.in_size, dtype=torch.bfloat16)  # with one token, most of the time is dequantising
        taken = self._time(lambda: weight.times_transposed(x), seconds)
        return self._constant(linear.num_weights / taken, f"the output projection of {self.source.name}")

    # Messages --------------------------------------------------------------------------------------------------------

    def _messages(self, seconds: float) -> Iterator[tuple[str, Constant]]:
        """Yield the constants of messages between the ranks of this host, and between all ranks of several hosts."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        groups = ranks_by_host()
        made = [distributed.new_group(ranks) for ranks in groups]
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        (index,) = (index for index, ranks in enumerate(groups) if rank in ranks)
        here = groups[index]
        part = seconds if len(groups) == 1 else seconds / 2  # half of it inside hosts, all at the same time
        if len(here) > 1:
            message, bandwidth = self._links(made[index], len(here), part)
            yield from self._link("node", message, bandwidth, f"{len(here)} ranks of a host")
        if len(groups) > 1:
            message, bandwidth = self._links(distributed.group.WORLD, world_size, part)
            words = f"{world_size} ranks of {len(groups)} hosts"
            yield from self._link("network", message, bandwidth / len(here), words)

    def _link(self, name: str, message: float, bandwidth: float, words: str) -> Iterator[tuple[str, Constant]]:
        what = f"all-reduces and gathers of {words}"
        if self.preset is not None:
            yield f"{name}_link", self._constant(bandwidth / self.preset[f"{name}_bandwidth"], what)
        else:
            yield f"{name}_bandwidth", self._constant(bandwidth, what)
            yield f"{name}_link", self._constant(1.0, "the measured bandwidth is that of collectives")
        yield "message", self._constant(message, what)

    def _links(self, group: Any, size: int, seconds: float) -> tuple[float, float]:
        """Return the seconds of a small message and, without these seconds, the bytes per second of a large message."""
        taken: list[float] = []
        for length in _MESSAGES[self.device.type]:
            part = torch.zeros(length // 4, device=self.device)
            whole = torch.zeros(size * (length // 4), device=self.device)
            gather = partial(distributed.all_gather_into_tensor, whole, part, group=group)
            steps = (partial(distributed.all_reduce, whole, group=group), gather)
            taken.append(sum(self._time(step, seconds / 4, group) for step in steps))
        small, large = taken
        carried = 3 * (size - 1) * length  # bytes over a ring: of the gather once, of the all-reduce twice
        return small / 2, carried / max(large - small, 1e-9)

    # Steps of an engine ----------------------------------------------------------------------------------------------

    def alone(self, machine: Machine) -> Machine:
        """Return `machine` with the constants that tiny steps determine. Call this first, while the process is idle."""
        unknown = machine.changed(dict.fromkeys(_UNKNOWN, _NOTHING))
        one, many = (_tiny_step(unknown, num_layers=number) for number in (1, _LAYERS))
        block = max(0.0, many.seconds - one.seconds) / (2 * (_LAYERS - 1))
        found = {
            "block": self._constant(block, f"a step of {_LAYERS} tiny layers beside one of 1"),
            "step": self._constant(max(0.0, one.left - 2 * block), "a step of 1 tiny layer beside its passes"),
        }
        if self.device.type == "cpu" and (idle := idle_bytes()):
            found["context"] = self._constant(float(idle), "anonymous memory of an idle rank")
        return machine.changed(found)

    def beside(self, machine: Machine) -> Machine:
        """Return `machine` with constants that are computed from the time that all other constants do not explain."""
        if distributed.get_world_size() % 2 == 0:
            known = machine.changed({"instruction": _NOTHING})
            two = _tiny_step(known, num_layers=2, pipeline_parallel=2, micro_batches=_MICRO_BATCHES)
            left = two.left / (2 * (_MICRO_BATCHES + 1))  # passes on the longest path through two stages
            words = "a step of 2 tiny stages beside its passes and messages"
            machine = machine.changed({"instruction": self._constant(left, words)})
        own = _own_step(machine.changed({"elementwise": Constant(1.0, "as copies")}), self.source, tokens=self.tokens)
        moved, of = own.planned.elementwise, f"{self.source.name} over {self.tokens:,} tokens"
        words = f"a step of 2 layers of {of}, beside what other constants explain"
        words = words if own.left else f"as copies, as nothing was left of {words}"
        return machine.changed({"elementwise": self._constant(moved / (moved + own.left), words)})


def _tiny_step(machine: Machine, *, num_layers: int, **more: Any) -> MeasuredStep:
    shape = families.shape_from_hf(small_llama(256, 64, 128, num_layers, 4, 2), source="tiny")
    source = ModelSource("tiny", None, shape)
    return measured_step(machine, {"length": _LENGTH, **more}, repeats=_TINY_REPEATS, source=source)


def _own_step(machine: Machine, source: ModelSource, *, tokens: int) -> MeasuredStep:
    values = {"model": source.name, "num_layers": 2, "length": tokens, "random_weights": not is_preset(source.name)}
    return measured_step(machine, values, repeats=_REPEATS)


def _limited(seconds: float, read: float, least: float) -> tuple[float, float]:
    """Split `seconds` into computing, which takes at least `least` seconds (at the peak), and reading."""
    read = max(0.0, min(read, seconds - least))
    return seconds - read, read
