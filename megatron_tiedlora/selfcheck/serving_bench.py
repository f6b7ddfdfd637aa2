"""Measures vLLM with many adapters: in tied slots, as exports in vLLM's own slots, and the base without adapters.

Each side has an engine in its own process, which runs the engine's steps itself. So the times are those of tokens, and
the CPU seconds are those of one side. A miss copies an adapter into a slot.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, initial_values, make_adapter_config, targets_of
from megatron_tiedlora.base.files import write_json
from megatron_tiedlora.base.messages import UserError, first_line
from megatron_tiedlora.base.output_folder import require_room
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import identify_shape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, write_adapter_files
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.convert.export_peft import export_peft, target_modules
from megatron_tiedlora.convert.serving import VLLM_RANKS, allowed_rank
from megatron_tiedlora.parallel.shard_spec import draw_normal
from megatron_tiedlora.selfcheck import compare, step_bench, timing

NATIVE, EXPANDED, MERGED, NO_FLAG = "native", "expanded", "merged", "expanded, no flag"
# vLLM reads these when it is imported. The engine then runs in the side's process, on any core, without messages.
_ENVIRONMENT = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
_BLOCK = 128  # tokens; vLLM's largest default block of keys and values
_STD = 0.5  # of factors that start at zero
_SIZES = "--in_batch, --slots, --served or --num_layers"
_SETTINGS = ("model", "method", "rank", "targets", "batch_size", "length", "new_tokens", "served", "draws")


# In the process of a side ---------------------------------------------------------------------------------------------


class MeasuredEngine:
    """vLLM's engine in this process. Its adapters are in the folders 0, 1, ... of the folder `adapters`."""

    def __init__(self, options: Mapping[str, Any], adapters: Path, settings: BenchSettings) -> None:
        os.environ.update(_ENVIRONMENT)
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self.settings, self.folder, self.llm = settings, adapters / "0", LLM(**options)
        self.misses = self.draws = 0
        self.engine, names = self.llm.llm_engine, map(str, range(settings.served))
        self.adapters = [LoRARequest(name, index, str(adapters / name)) for index, name in enumerate(names, start=1)]
        self.sampling = SamplingParams(max_tokens=settings.new_tokens, ignore_eos=True, temperature=0, detokenize=False)
        self.manager: Any = None
        if "enable_lora" in options:
            (self.manager,) = self.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)
            self.activate, self.manager.activate_adapter = self.manager.activate_adapter, self.count
        self.serve([None])

    def count(self, adapter: int) -> bool:
        """Activate an adapter, and count it as a miss if it was copied into a slot."""
        copied = bool(self.activate(adapter))
        self.misses += copied
        return copied

    def load(self) -> dict[str, Any]:
        """Load all adapters. Return the seconds, and bytes: of a slot, in host memory, and of an adapter's files."""
        for request in self.adapters:
            self.engine.remove_lora(request.lora_int_id)
        before, seconds = timing.idle_bytes("VmRSS"), _stopwatch()  # VmRSS includes mapped files, which vLLM may keep
        for request in self.adapters:
            self.engine.add_lora(request)
        spent, after = seconds(), timing.idle_bytes("VmRSS")
        names = ("lora_a_stacked", "lora_b_stacked", "slots")  # vLLM's slots and the tied ones; layers share tied A, B
        layers = self.manager.modules.values()
        stacks = (stack for layer in layers for name in names if (stack := getattr(layer, name, None)) is not None)
        held = {part.untyped_storage().data_ptr(): part for stack in stacks for part in stack}
        return {
            **spent,
            "slot": timing.storage_bytes(held) // self.manager.lora_slots,
            "host": None if before is None or after is None else after - before,
            "disk": _folder_bytes(self.folder),
        }

    def draw(self) -> dict[str, Any]:
        """Serve --draws requests for adapters that are drawn by Zipf's law, other ones in each call. All adapters are
        in host memory. Without LoRA, serve the base."""
        if self.manager is not None and not self.draws:
            self.load()
        self.draws += 1
        drawn = zipf_draw(self.settings.draws, self.settings.served, seed=self.draws)
        return self.serve([None] * len(drawn) if self.manager is None else drawn)

    def serve(self, adapters: Sequence[int | None]) -> dict[str, Any]:
        """Serve made-up prompts with these adapters (None: the base), --batch_size at once. Return the figures, and the
        new tokens of each request as `rows`."""
        size = len(adapters), self.settings.length
        prompts = np.random.default_rng(0).integers(3, self.llm.model_config.get_vocab_size(), size).tolist()
        waiting, running, missed = list(range(len(adapters)))[::-1], 0, self.misses
        times, rows = ([list[Any]() for _ in prompts] for _ in range(2))
        seconds = _stopwatch()
        while waiting or running:
            while waiting and running < self.settings.batch_size:
                index = waiting.pop()
                request = None if (adapter := adapters[index]) is None else self.adapters[adapter]
                times[index].append(time.perf_counter())
                prompt = {"prompt_token_ids": prompts[index]}
                self.engine.add_request(str(index), prompt, self.sampling, lora_request=request)
                running += 1
            for output in self.engine.step():
                index = int(output.request_id)
                times[index].append(time.perf_counter())
                rows[index] = list(output.outputs[0].token_ids)
                running -= output.finished
        return {
            **seconds(),
            "first": percentiles([own[1] - own[0] for own in times]),
            "next": percentiles([after - before for own in times for before, after in itertools.pairwise(own[1:])]),
            "misses": self.misses - missed,
            "rows": rows,
        }


def _stopwatch() -> Callable[[], dict[str, float]]:
    """Return a function that returns the seconds since now: of the clock, and of all threads of this process."""
    clock, cpu = time.perf_counter(), time.process_time()
    return lambda: {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}


def percentiles(values: Sequence[float]) -> list[float]:
    """Return the 50th and the 99th percentile, interpolated; [] for no values."""
    return [float(value) for value in np.percentile(values, (50, 99))] if values else []


_engine: list[MeasuredEngine] = []  # the one of this process


def start_engine(side: str, *given: Any) -> None:
    """Start this process's engine. Raise UserError with the name of the side if vLLM does not start or answer."""
    try:
        _engine.append(MeasuredEngine(*given))
    except Exception as error:  # of many types
        said = f"{side}: vLLM cannot serve this model ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{said}; give another --model, or lower --in_batch and --slots if memory ran out") from None


def ask_engine(method: str, *given: Any) -> Any:
    """Call a method of this process's engine."""
    return getattr(_engine[0], method)(*given)


# The measurement ------------------------------------------------------------------------------------------------------


def zipf_draw(count: int, number: int, *, seed: int) -> list[int]:
    """Return `count` indices below `number`. The probability of index i is in proportion to 1 / (i + 1)."""
    weights = 1.0 / np.arange(1, number + 1)
    drawn: list[int] = np.random.default_rng(seed).choice(number, count, p=weights / weights.sum()).tolist()
    return drawn


def equal_slots(expanded: int, sizes: Mapping[str, int], *, most: int) -> dict[str, int]:
    """Return how many slots each side has in the bytes of `expanded` slots of the expanded side: 1 to `most`. `sizes`
    has the bytes of a slot of each side."""
    return {side: max(1, min(most, expanded * sizes[EXPANDED] // size)) for side, size in sizes.items()}


def engine_options(source: ModelSource, settings: BenchSettings) -> dict[str, dict[str, Any]]:
    """Return the arguments of vLLM's LLM for `every side`, without the model, and the other ones of each side."""
    if not (rank := allowed_rank(settings.rank)):
        raise UserError(f"--rank {settings.rank}: vLLM serves ranks up to {VLLM_RANKS[-1]}; give a lower rank")
    dtype, tokens, heads = DTYPES[settings.dtype], settings.length + settings.new_tokens, source.shape.heads
    block = _BLOCK * 2 * source.shape.num_layers * heads.num_kv * heads.dim * dtype.itemsize
    lora = {"enable_lora": True, "max_lora_rank": rank, "max_cpu_loras": settings.served}
    flag = {**lora, "lora_target_modules": target_modules(source.shape.block, settings.targets)}
    common = {
        **{"dtype": str(dtype).removeprefix("torch."), "load_format": "auto" if source.folder else "dummy"},
        **{"enforce_eager": timing.default_device().type == "cpu", "enable_prefix_caching": False},
        **{"skip_tokenizer_init": True, "max_model_len": tokens, "max_num_seqs": settings.batch_size},
        "kv_cache_memory_bytes": (settings.batch_size + 2) * -(-tokens // _BLOCK) * block,
        "gpu_memory_utilization": 0.05,  # must be free; does not limit the size above
    }
    tied = {**flag, "additional_config": {"tied_lora": True}}
    return {"every side": common, NATIVE: tied, EXPANDED: flag, NO_FLAG: lora, MERGED: {}}


def _write_adapters(source: ModelSource, config: AdapterConfig, folder: Path, settings: BenchSettings) -> None:
    """Write --served adapters of random values into NATIVE in the folder, and their exports into EXPANDED."""
    identity = identify_shape(source, settings.dtype, weights_hash="random")
    for number in progress_bar("write", "adapter", range(settings.served)):
        native, export = (folder / side / str(number) for side in (NATIVE, EXPANDED))
        native.mkdir(parents=True)
        export.parent.mkdir(exist_ok=True)
        own = replace(config, seed=number)
        state = {
            name: value if value.any() else draw_normal(value.shape, std=_STD, seed=number, name=name)
            for name, value in initial_values(own).items()
        }
        write_adapter_files(native, own, identity, state)
        adapter = NativeAdapter(own, identity, state)
        export_peft(source, adapter, export, base_differs=True, identify=lambda *_: identity)
        if number == 0:
            require_room(folder, settings.served * sum(map(_folder_bytes, (native, export))), output=folder)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure_serving(settings: BenchSettings) -> dict[str, Any]:
    """Measure the sides of --what serving, and return the report.

    Raises:
        UserError: a value is not valid, vLLM cannot serve the model, or there is no room for the adapters.
    """
    source = step_bench.benchmark_source(settings)
    source.check_length("--length + --new_tokens", settings.length + settings.new_tokens)
    layers, targets = tuple(range(1, source.shape.num_layers + 1)), targets_of(source.shape, settings.targets)
    config = make_adapter_config(settings.method, rank=settings.rank, layers=layers, targets=targets, seed=0)
    if any(config.num_slots(name) > 1 for name, (_, factor) in config.tensors.items() if factor in "AB"):
        raise UserError(f"--method {settings.method}: layers do not share A and B, so it has no tied slots; give tl6")
    options, before = engine_options(source, settings), os.getloadavg()[0]
    tied, loaded, timed = (NATIVE, EXPANDED), (NATIVE, EXPANDED, NO_FLAG), (NATIVE, EXPANDED, MERGED)
    with tempfile.TemporaryDirectory(prefix="tiedlora-bench-") as temporary:
        folder = Path(temporary)
        if source.folder is None:
            write_json(folder / "config.json", step_bench.random_config(settings) or {})
        _write_adapters(source, config, folder, settings)

        def measured(
            slots: Mapping[str, int], calls: Mapping[str, tuple[Any, ...]], uncounted: int = 1
        ) -> dict[str, dict[str, Any]]:
            """Start sides with these slots, and return the lists of figures of calls: (side, method, arguments)."""
            with ExitStack() as stack:
                asks = {}
                for side, number in slots.items():
                    own = {**options["every side"], **options[side], "model": str(source.folder or folder)}
                    own |= {"max_loras": number} if number else {}
                    asks[side] = stack.enter_context(timing.own_process(side, smaller=_SIZES))
                    asks[side](start_engine, side, own, folder / (NATIVE if side == NATIVE else EXPANDED), settings)
                timers = {name: partial(asks[side], ask_engine, *call) for name, (side, *call) in calls.items()}
                found = timing.take_turns(timers, repeats=settings.repeats, uncounted=uncounted)
            return {name: {key: [turn[key] for turn in turns] for key in turns[0]} for name, turns in found.items()}

        # All turns count, as only the first load takes new memory from the system.
        memory = measured(dict.fromkeys(loaded, 1), {side: (side, "load") for side in loaded}, uncounted=0)
        calls = {
            f"{most}, {side}": (side, "serve", [index % most if most else None for index in range(settings.batch_size)])
            for most in settings.in_batch
            for side in (tied if most else timed)
        }
        most = max(settings.in_batch)
        batches = measured({**dict.fromkeys(tied, most or 1), MERGED: 0}, calls)
        slots = equal_slots(settings.slots, {side: memory[side]["slot"][0] for side in tied}, most=settings.served)
        zipf = measured({**slots, MERGED: 0}, {side: (side, "draw") for side in timed})
    of_most = [batches[f"{most}, {side}"]["rows"][0] for side in tied]
    for own in (*batches.values(), *zipf.values()):
        own["tokens"] = sum(map(len, own.pop("rows")[0]))
    return {
        **timing.about(settings, None, timing.default_device(), *_SETTINGS),
        "load": [before, os.getloadavg()[0]],
        "engines": options,
        "equal_tokens": compare.share_of_equal_tokens(*of_most),
        "batches": batches,
        "zipf": {side: {"slots": slots.get(side), **own} for side, own in zipf.items()},
        "memory": memory,
    }
