"""Part ranks: every layout that fits on this host against one rank, the network, and a killed rank."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.random_model import write_random_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.gpu_checks.attention import relative, worst_of
from megatron_tiedlora.gpu_checks.rank_orders import (
    ADAPTER,
    RESULT,
    STEPPING,
    Case,
    Rank,
    RankOrder,
    started_ranks,
    wait_for,
    wait_for_ranks,
)
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report, Status
from megatron_tiedlora.runtime.launch_env import free_port

SIZES = (1, 2, 4, 8)
# A model that eight ranks can share in any layout, whose vocabulary size none of these numbers divides.
SHAPE: dict[str, Any] = {
    **PRESETS["llama2-7b"],
    "vocab_size": 1003,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
# Relative errors of losses and of the adapter's change, in which elements with tiny gradients may have either sign.
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
CHANGE_BOUND = 5e-3
# Few cases per start, so that a crash loses only these, and so that their communicators fit in memory: only the end of
# the process frees them (0.3 to 0.7 GB each on NVLink, six per layout).
CASES_OF_A_START = 6
SHARING = (2, 30)  # since this version NCCL lets several ranks share a GPU
SHARING_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
NOTICED_SECONDS = 45.0  # after a rank's death; 30 of them are the heartbeat's limit (docs/clusters.md)
# Shares of the part's time: one rank must have finished by the first, all layouts by the second, and the ranks of which
# one is killed must be training by the third.
ALONE, LAYOUTS, WORKING = 0.25, 0.75, 0.9
DOCTOR_SECONDS = 30.0  # for ranks to meet, and for an answer; twice as much in total, and a few for its own start
DIFFERS_FIX = (
    "several ranks give other results: run `tiedlora doctor`, and this part again with NCCL_DEBUG=INFO and with"
    " NCCL_P2P_DISABLE=1; if that corrects it, the hosts' PCIe settings (IOMMU, ACS) break copies between GPUs"
)
FAILED_FIX = "see the rank's output in the report's folder; NCCL_DEBUG=INFO shows more"
LOST_FIX = "see docs/clusters.md on lost ranks, and the ranks' output in the report's folder"


def check(report: Report, options: CheckOptions) -> None:
    """All of the part."""
    began = time.monotonic()
    world_size, variables, reason = _possible(options)
    if world_size == 1:
        report.skip("several ranks", reason)
        return
    report.tell("ranks", world_size, why=reason)
    with tempfile.TemporaryDirectory(prefix="check_gpu-ranks-") as folder:
        with report.attempt("a small model", fix="make sure that the temporary folder is writable (TMPDIR)"):
            write_random_model(SHAPE, Path(folder, "model"), name="a small model", seed=0)
        model = str(Path(folder, "model"))
        order = RankOrder((), folder, options.folder, model, options.device, world_size, variables)

        def left(share: float) -> float:
            """Seconds until this share of the part's time is over."""
            return began + share * options.seconds - time.monotonic()

        check_layouts(report, order, left=left)
        check_death(report, order, limit=left(WORKING))
    if options.on_gpu and torch.cuda.device_count() > 1:
        _doctor(report, torch.cuda.device_count())


def _possible(options: CheckOptions) -> tuple[int, dict[str, str], str]:
    """(the number of ranks that can be started here, variables that they need, why this number)."""
    if not options.on_gpu:
        return 2, {}, "two on a CPU, over gloo"
    count = torch.cuda.device_count()
    if count > 1:
        usable = max(size for size in SIZES if size <= count)
        return usable, {}, f"one for each of {count} GPUs" if usable == count else f"of {count} GPUs"
    found = loaded_nccl()
    text = ".".join(map(str, found)) if found else "unknown"
    if found < SHARING:
        wanted = ".".join(map(str, SHARING))
        return 1, {}, f"one GPU, which several ranks can share since NCCL {wanted}; this is {text}"
    return 2, {SHARING_VARIABLE: "1"}, f"two on one GPU, with {SHARING_VARIABLE}=1 of NCCL {text}"


def loaded_nccl() -> tuple[int, ...]:
    """The version of the NCCL in this process, including a preloaded one; () if it cannot be found."""
    torch.cuda.is_available()  # torch has loaded its libraries
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnccl" in line}
    for name in (None, *sorted(paths)):
        number = ctypes.c_int()
        try:
            ctypes.CDLL(name).ncclGetVersion(ctypes.byref(number))
        except (AttributeError, OSError):
            continue
        return number.value // 10000, number.value // 100 % 100, number.value % 100
    return ()


def cases_of(world_size: int, device: str) -> tuple[Case, ...]:
    """Every layout that fits; the other ZeRO stages; and without sequence parallelism and, on a GPU, in bf16."""
    pairs = [(tp, pp) for tp in SIZES for pp in SIZES if world_size % (tp * pp) == 0]
    layouts = [Case(tp, pp) for tp, pp in pairs]
    engines = [Case(zero=zero) for zero in (0, 2, 3)]
    narrow = [Case(tp=tp, dtype="bf16") for tp in (world_size, world_size // 2)] if device == "cuda" else []
    return tuple(dict.fromkeys([*layouts, *engines, Case(tp=world_size, sp=False), *narrow]))


def check_layouts(report: Report, order: RankOrder, *, left: Callable[[float], float]) -> None:
    """Compare losses and adapter of each layout with those of one rank; the ranks compare their replicas bit by bit.

    Args:
        left: seconds until a share of the part's time is over.
    """
    world_size, cases = order.world_size, cases_of(order.world_size, order.device)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    alone = tuple(Case(dtype=dtype) for dtype in dtypes)
    _start(report, "one rank", replace(order, cases=alone, world_size=1), limit=left(ALONE))
    firsts = range(0, len(cases), CASES_OF_A_START)
    for number, first in enumerate(firsts):
        some = replace(order, cases=cases[first : first + CASES_OF_A_START], first=first)
        limit = left(LAYOUTS) / (len(firsts) - number)
        _start(report, f"{world_size} ranks, start {number + 1} of {len(firsts)}", some, limit=limit)
    for number, case in enumerate(cases):
        label = case.named(world_size)
        expected = Path(order.folder, f"1-{dtypes.index(case.dtype)}")
        with report.attempt(label, fix=FAILED_FIX):
            compare(report, label, case, Path(order.folder, f"{world_size}-{number}"), expected, order)


def _start(report: Report, name: str, order: RankOrder, *, limit: float) -> None:
    """Let ranks run the order's cases; report a failure if they do not finish in time."""
    with report.attempt(name, fix=FAILED_FIX), started_ranks(order) as ranks:
        if not wait_for_ranks(ranks, limit):
            report.add(name, "fail", why=why_not_ended(ranks, limit), fix=FAILED_FIX)


def compare(report: Report, label: str, case: Case, found: Path, expected: Path, order: RankOrder) -> None:
    """Compare one case's results with those of one rank."""
    for folder in (expected, found):
        if not (folder / RESULT).exists():
            said = sorted(file.read_text().strip().splitlines()[-1] for file in folder.glob("error*"))
            report.add(label, "fail", why=said[0] if said else "it did not finish", fix=FAILED_FIX)
            return
    losses, one = (json.loads((folder / RESULT).read_text())["losses"] for folder in (found, expected))
    steps = [torch.tensor(values, dtype=torch.float64) for values in zip(losses, one, strict=True)]
    apart = {str(number): relative(*values) for number, values in enumerate(steps, start=1)}
    report.at_most(
        f"{label}: losses",
        apart[worst_of(apart)],
        LOSS_BOUNDS[case.dtype],
        why="relative to one rank",
        fix=DIFFERS_FIX,
    )
    if case.dtype != "fp32":
        return
    adapter, alone = load_file(found / ADAPTER), load_file(expected / ADAPTER)
    # The norm of AdamW's change is about steps x learning rate x sqrt(elements), for any gradient.
    change = order.steps * order.learning_rate
    errors = {
        name: float((adapter[name] - tensor).norm()) / (change * tensor.numel() ** 0.5)
        for name, tensor in alone.items()
    }
    name = worst_of(errors)
    report.at_most(
        f"{label}: adapter", errors[name], CHANGE_BOUND, why=f"{name}, relative to its change", fix=DIFFERS_FIX
    )


def check_death(report: Report, order: RankOrder, *, limit: float) -> None:
    """Kill the last rank during training: the others must end in time and name it."""
    label, victim = "a killed rank", order.world_size - 1
    endless = replace(order, cases=(Case(tp=2),), endless=True)
    with report.attempt(label, fix=FAILED_FIX), started_ranks(endless) as ranks:
        ready = wait_for(
            lambda: (
                all(Path(order.folder, f"{STEPPING}{rank}").exists() for rank in range(order.world_size))
                or any(rank.process.poll() is not None for rank in ranks)
            ),
            limit,
        )
        if not ready or any(rank.process.poll() is not None for rank in ranks):
            report.add(label, "fail", why=why_not_ended(ranks, limit), fix=FAILED_FIX)
            return
        began = time.monotonic()
        ranks[victim].process.kill()
        others = [rank for number, rank in enumerate(ranks) if number != victim]
        ended = wait_for(lambda: all(rank.process.poll() is not None for rank in others), NOTICED_SECONDS + 15)
        seconds = time.monotonic() - began
        report.expect(
            f"{label}: the others end",
            ended and seconds <= NOTICED_SECONDS and all(rank.process.returncode for rank in others),
            seconds,
            unit="s",
            expected=f"<= {NOTICED_SECONDS:.0f}, with a failure",
            fix=LOST_FIX,
        )
        said = next((line for rank in others if (line := naming_line(rank.output, victim))), None)
        report.expect(f"{label}: they name it", said is not None, said or "no", expected=f"rank {victim}", fix=LOST_FIX)


def naming_line(output: str, victim: int) -> str | None:
    """The line in which a rank reports that the victim is lost."""
    lines = output.splitlines()
    return next((line.strip() for line in lines if re.search(rf"error: .*\brank {victim}\b", line)), None)


def why_not_ended(ranks: Sequence[Rank], limit: float) -> str:
    """The last error of the first rank that failed; if none has failed, how long the others were waited for."""
    failed = next((rank for rank in ranks if rank.process.poll()), None)
    if failed is not None:
        return last_error(failed.output)
    slow = next((number for number, rank in enumerate(ranks) if rank.process.poll() is None), 0)
    return f"not finished after {limit:.0f} s; the last line of rank {slow}: {last_error(ranks[slow].output)}"


def last_error(output: str) -> str:
    """The last line of a rank's output that names an error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    return (named or lines or ["nothing was printed"])[-1][:600]


def _doctor(report: Report, count: int) -> None:
    """The doctor's all-reduces over all GPUs of this host."""
    with report.attempt("the doctor's all-reduces", fix="run `tiedlora doctor` by hand"):
        command = [
            *(sys.executable, "-P", "-m", "megatron_tiedlora", "doctor"),
            "--json=-",
            f"--tensor_parallel={max(s for s in SIZES if count % s == 0)}",
            f"--master_port={free_port()}",
            f"--timeout_seconds={DOCTOR_SECONDS:.0f}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DOCTOR_SECONDS + 90)
        if not done.stdout.strip():
            raise UserError(last_error(done.stderr))
        found = json.loads(done.stdout)
        for problem in found["findings"]:
            status: Status = "fail" if problem["level"] == "error" else "warn"
            report.add(f"the doctor: {problem['code']}", status, why=problem["message"], fix=problem["fix"])
        for group in found["groups"]:
            name = f"all-reduce over {len(group['ranks'])} GPUs ({group['kind']})"
            sums = "right" if group["correct"] else "wrong"
            report.expect(f"{name}: sums", group["correct"], sums, expected="right", fix=DIFFERS_FIX)
            report.tell(name, group["bus_bytes_per_second"] / 1e9, "GB/s", why="of 64 MB; bandwidth per link")
            report.tell(f"{name}, 4 kB", 1e6 * group["latency_seconds"], "us")
