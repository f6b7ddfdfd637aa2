"""Measures vLLM with many adapters: in tied slots, as exports in vLLM's own slots, and the base without adapters.

The sides take turns. In a turn, a side starts vLLM in a new process, which runs the engine's steps itself. So the times
are those of tokens, the CPU seconds are those of one side, and only one side takes memory. 0 is the base, 1 an adapter.
"""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.files import write_json
from megatron_tiedlora.base.messages import UserError, first_line
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import identify_shape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.convert.export_peft import export_peft, target_modules
from megatron_tiedlora.convert.serving import VLLM_RANKS, allowed_rank
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter
from megatron_tiedlora.parallel.shard_spec import draw_normal
from megatron_tiedlora.planning.memory import cache_bytes
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.selfcheck import step_bench, timing

NATIVE, EXPANDED, NO_FLAG, MERGED = SIDES = "native", "expanded", "expanded, no flag", "merged"
LOAD = "load of all"
# vLLM reads these when it is imported. The engine then runs in the side's process, on any core, without messages.
_ENVIRONMENT = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
_STD = 0.3  # of all factors; updates of x are then about as large as x, so that adapters change the tokens
_SETTINGS = "model", "method", "rank", "targets", "batch_size", "length", "new_tokens", "served"
_DRAWS = 4  # requests by Zipf's law, for each request at once


class MeasuredEngine:
    """vLLM's engine in this process. Its adapters are in the folders 1, 2, ... of `folder`."""

    def __init__(self, options: Mapping[str, Any], folder: Path, settings: BenchSettings) -> None:
        os.environ.update(_ENVIRONMENT)
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        llm, size = LLM(**options), (_DRAWS * settings.batch_size, settings.length)
        self.engine, self.batch_size, self.misses, self.slots = llm.llm_engine, settings.batch_size, 0, 0
        self.prompts = np.random.default_rng(0).integers(3, llm.model_config.get_vocab_size(), size).tolist()
        self.sampling = SamplingParams(max_tokens=settings.new_tokens, ignore_eos=True, temperature=0, detokenize=False)
        self.requests: dict[int, Any] = {}  # of the merged side, which serves only the base
        if "enable_lora" in options:
            self.requests = {n: LoRARequest(str(n), n, str(folder / str(n))) for n in range(1, settings.served + 1)}
            (manager,) = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)
            self.slots, self.manager, self.activate = manager.lora_slots, manager, manager.activate_adapter
            manager.activate_adapter = self.count

    def count(self, adapter: int) -> bool:
        """Activate an adapter, and count it as a miss if it was copied into a slot."""
        self.misses += (copied := bool(self.activate(adapter)))
        return copied

    def measure(self, adapters: Sequence[int] | None) -> dict[str, Any]:
        """Serve a request with each of these adapters, or load all adapters for None, and return the figures. The host
        memory of a load includes files that stay mapped. It is 0 if the system does not report it."""
        resident, missed = timing.idle_bytes("VmRSS") or 0, self.misses
        clock, cpu = time.perf_counter(), time.process_time()
        gaps = [1000 * np.diff(own) for own in self.serve(adapters or ())]
        for request in reversed(self.requests.values()) if adapters is None else ():
            self.engine.add_lora(request)  # the most used ones by Zipf's law last, so that they stay in the slots
        figures = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        figures |= {"tokens": sum(map(len, gaps)), "slots": self.slots, "misses": self.misses - missed}
        for token, part in {"first": slice(1), "next": slice(1, None)}.items():
            if len(values := np.concatenate([[], *(own[part] for own in gaps)])):
                figures |= {f"{token}_p{of}_ms": float(np.percentile(values, of)) for of in (50, 99)}
        if adapters is None and self.slots:
            figures["host_mb"] = ((timing.idle_bytes("VmRSS") or 0) - resident) / 1e6
            # Of vLLM's stacks or of the tied slots, whose A and B are the same in all layers.
            names, layers = ("lora_a_stacked", "lora_b_stacked", "slots"), self.manager.modules.values()
            stacks = (stack for layer in layers for name in names if (stack := getattr(layer, name, None)) is not None)
            held = {part.untyped_storage().data_ptr(): part for stack in stacks for part in stack}
            figures["slot_bytes"] = timing.storage_bytes(held) // self.slots
        return figures

    def serve(self, adapters: Sequence[int]) -> list[list[float]]:
        """Serve a request with each adapter, --batch_size at once. Return the clock at its start and at its tokens."""
        times: list[list[float]] = [[] for _ in adapters]
        waiting, free, left = iter(enumerate(adapters)), self.batch_size, len(adapters)
        while left:
            for index, adapter in islice(waiting, free):
                times[index].append(time.perf_counter())
                prompt, request = {"prompt_token_ids": self.prompts[index]}, self.requests.get(adapter)
                self.engine.add_request(str(index), prompt, self.sampling, lora_request=request)
            outputs = self.engine.step()
            for output in outputs:
                times[int(output.request_id)].append(time.perf_counter())
            free = sum(output.finished for output in outputs)
            left -= free
        return times


def measure_side(
    side: str, options: Mapping[str, Any], folder: Path, settings: BenchSettings, rows: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """Start vLLM in this process, and return the figures of each row: those of the last of its steps (see
    `MeasuredEngine.measure`). Other steps bring adapters into the slots. Raise UserError with `side` if vLLM fails."""
    try:
        engine = MeasuredEngine(options, folder, settings)
        return {row: [engine.measure(adapters) for adapters in steps][-1] for row, steps in rows.items()}
    except Exception as error:  # of many types
        said = f"{side}: vLLM cannot serve this model ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{said}; give another --model, or lower --in_batch and --slots if memory ran out") from None


def engine_options(plan: RunPlan, settings: BenchSettings) -> dict[str, dict[str, Any]]:
    """Return the arguments of vLLM's LLM for `every side`, without the model, and the other ones of each side."""
    if not (rank := allowed_rank(settings.rank)):
        raise UserError(f"--rank {settings.rank}: vLLM serves ranks up to {VLLM_RANKS[-1]}; give a lower rank")
    source, requests, tokens = plan.source, settings.batch_size, settings.length + settings.new_tokens
    source.check_length("--length + --new_tokens", tokens)
    common = dict(
        dtype=str(plan.dtype).removeprefix("torch."), load_format="auto" if source.folder else "dummy",
        enforce_eager=timing.default_device().type == "cpu", enable_prefix_caching=False, skip_tokenizer_init=True,
        max_model_len=tokens, max_num_seqs=requests,
        # Enough for all requests at once, in vLLM's largest blocks of keys and values.
        kv_cache_memory_bytes=cache_bytes(plan.stages[0], sequences=requests + 2, tokens=tokens + 128),
    )  # fmt: skip
    no_flag = {"enable_lora": True, "max_lora_rank": rank, "max_cpu_loras": settings.served}
    expanded = {**no_flag, "lora_target_modules": target_modules(source.shape.block, settings.targets)}
    native = {**expanded, "additional_config": {"tied_lora": True}}
    return {"every side": common, NATIVE: native, EXPANDED: expanded, NO_FLAG: no_flag, MERGED: {}}


def _write_adapters(source: ModelSource, config: AdapterConfig, folder: Path, settings: BenchSettings) -> None:
    """Write --served random adapters into NATIVE in the folder, and their exports into EXPANDED."""
    identity = identify_shape(source, settings.dtype, weights_hash="random")
    for number in progress_bar("write", "adapter", range(1, settings.served + 1)):
        state = {name: draw_normal(config.shape(name), std=_STD, seed=number, name=name) for name in config.tensors}
        adapter = NativeAdapter(config, identity, state)
        if reason := ServedAdapter(source, adapter).why_not_tied:
            raise UserError(f"--{reason}, so it has no tied slots; give tl6")
        save_adapter(folder / NATIVE / str(number), adapter)
        export_peft(source, adapter, folder / EXPANDED / str(number), base_differs=True, identify=lambda *_: identity)


def measure_serving(settings: BenchSettings) -> dict[str, Any]:
    """Measure the sides of --what serving, and return the report. Raise UserError if a value is not valid."""
    plan = step_bench.plan_benchmark(settings)
    options, before = engine_options(plan, settings), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="tiedlora-bench-") as temporary:
        folder, served = Path(temporary), settings.served
        if plan.source.folder is None:
            write_json(folder / "config.json", step_bench.random_config(settings) or {})
        _write_adapters(plan.source, plan.adapter, folder, settings)

        def measured(slots: Mapping[str, int], rows: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
            """Return the figures of the rows in each turn of a side. Each side has these slots."""
            timers = {}
            for side, number in slots.items():
                given = {**options["every side"], **options[side], "max_loras": number}
                given["model"] = str(plan.source.folder or folder)
                adapters = folder / (NATIVE if side == NATIVE else EXPANDED)
                timers[side] = partial(timing.in_own_process, side, measure_side, side, given, adapters, settings, rows)
            return timing.take_turns(timers, repeats=settings.repeats, uncounted=0)

        memory = measured(dict.fromkeys(SIDES[:-1], 1), {LOAD: [[0], None]})
        turn, in_batch = np.arange(settings.batch_size), settings.in_batch
        rows = {f"adapters at once: {n}": 2 * [(turn % n + 1 if n else 0 * turn).tolist()] for n in in_batch}
        batches = measured(dict.fromkeys(SIDES, max((1, *in_batch))), rows)
        sizes = {side: turns[0][LOAD]["slot_bytes"] for side, turns in memory.items()}
        space, chances = settings.slots * sizes[EXPANDED], 1 / np.arange(1, served + 1)
        slots = {side: min(served, max(1, space // size)) for side, size in sizes.items()}
        drawn = np.random.default_rng(0).choice(served, (2, _DRAWS * len(turn)), p=chances / chances.sum()) + 1
        zipf = measured({**slots, MERGED: 1}, {"Zipf's law, equal bytes": [None, *drawn.tolist()]})
    about = timing.about(settings, None, timing.default_device(), *_SETTINGS)
    return {**about, "load": [before, os.getloadavg()[0]], "engines": options, "parts": [memory, batches, zipf]}
