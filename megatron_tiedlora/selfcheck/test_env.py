"""Checks the environment: records software versions and the package's choices, and measures matmul and copy rates."""

import subprocess
from contextlib import suppress

import pytest
import torch

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.model.fused_attention import choose_attention, one_by_one
from megatron_tiedlora.planning.machines import listed_peak
from megatron_tiedlora.runtime.machine import in_words, judge_machine, machine_record
from megatron_tiedlora.selfcheck import parts
from megatron_tiedlora.selfcheck.parts import Tell, option, report, warn_unless, why_no_gpu
from megatron_tiedlora.selfcheck.running import compute_dtype, small_shape
from megatron_tiedlora.training.throughput import compiled_kernels, matmul_rate, timed

pytestmark = pytest.mark.gpu

SIZE, COPIED = 8192, 2**30  # size of the matmul, and bytes of the copy
HEAD_DIM = 128
# Bounds on the fraction of a data sheet's matmul FLOP/s, and on bytes/s of a copy. A faster device computed nothing.
GOOD_SHARE, MOST_SHARE, MOST_COPIED = 0.6, 1.2, 40e12
SMI_FIELDS = (
    *("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "mig.mode.current", "ecc.mode.current"),
    *("ecc.errors.uncorrected.volatile.total", "pcie.link.gen.max", "pcie.link.width.max"),
)
SEGMENTS_FIX = (
    "expandable segments do not work here (an old driver, or a container without CUDA's virtual memory), so rows of"
    " many lengths waste memory: update the driver; part memory shows how much more is reserved than allocated"
)
PEERS_FIX = (
    "GPUs cannot read each other's memory, so their messages are copied through the host: look for NVLink in"
    " `nvidia-smi topo -m`, and for PCIe settings (ACS, IOMMU) and containers that prevent it"
)
TF32_FIX = (
    "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some containers set: runs with --dtype fp32 would round to TF32; the"
    " other parts of this check ignore it"
)
ATTENTION_FIX = (
    "packed rows will be slow: fix the problem in the reason, upgrade torch, or install flash_attn (docs/gpu.md)"
)
NOTHING_FIX = "no device is this fast, so nothing was computed: check the driver; the times below have no meaning"
CLOCKS_FIX = "look for low clocks, a power limit, heat or other processes: nvidia-smi -q -d CLOCK,POWER,TEMPERATURE"


def test_gpu(pytestconfig: pytest.Config) -> None:
    """Check that the ranks of a run would use a GPU."""
    missing = why_no_gpu() if option(pytestconfig, "device") == "cuda" else None
    assert missing is None, f"{missing}; docs/gpu.md lists what a GPU machine needs"


def test_machine(tell: Tell) -> None:
    """Record the output of `tiedlora env` for the environment of a run, and report the problems that it finds."""
    machine = machine_record()
    for section, values in in_words(machine).items():
        if section in ("versions", "machine", "variables"):
            for name, value in values.items():
                tell(name, value)
    report(judge_machine(machine), tell)


def test_fp32_matmuls(tell: Tell) -> None:
    """Check that matmuls in fp32 are not rounded to TF32."""
    precision = torch.get_float32_matmul_precision()
    tell("precision", precision)
    warn_unless(precision == "highest", tell, TF32_FIX)


def test_driver(gpu: torch.device, tell: Tell) -> None:
    """Record the values that the driver reports for the first GPU, whose name says whether it is PCIe or SXM (HBM3)."""
    tell(torch.cuda.get_device_name(0), parts.ask_driver(*SMI_FIELDS))


def test_expandable_segments(gpu: torch.device, tell: Tell) -> None:
    """Check that the allocator's segments can grow, as the package's environment asks."""
    torch.empty(2**26, device=gpu)  # the allocator keeps its segment
    grow = [bool(segment.get("is_expandable")) for segment in torch.cuda.memory_snapshot()]
    tell("segments that can grow", f"{sum(grow)} of {len(grow)}")
    warn_unless(all(grow), tell, SEGMENTS_FIX)


def test_peers(gpu: torch.device, tell: Tell) -> None:
    """Record how the GPUs are linked, and check that each can read the memory of each other."""
    count = torch.cuda.device_count()
    with suppress(OSError, subprocess.SubprocessError):  # the program is missing, fails or hangs
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True)
        tell("links", " | ".join(" ".join(line.split()) for line in done.stdout.splitlines()[: count + 1]))
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    tell("pairs without peer access", f"{len(apart)} of {len(pairs)}")
    warn_unless(not apart, tell, PEERS_FIX)


def test_attention(device: torch.device, tell: Tell) -> None:
    """Check that the chosen attention kernel computes all documents of a packed row in one call."""
    for dtype in dict.fromkeys((compute_dtype(device), torch.float32)):
        route = choose_attention(device, dtype, HEAD_DIM)
        tell(str(dtype), f"{route.name} ({route.reason})")
        warn_unless(route.attend is not one_by_one, tell, ATTENTION_FIX)


def test_compiled_kernels(gpu: torch.device, tell: Tell) -> None:
    """Check that torch can compile kernels for this GPU."""
    try:
        compiled_kernels(small_shape(), dtype=compute_dtype(gpu), device=gpu)
    except UserError as error:
        tell("not compiled", str(error))
        tell(parts.WARNING, parts.compiler_fix())


def test_matmul_ceiling(gpu: torch.device, tell: Tell) -> None:
    """Measure the FLOP/s of a large matmul with random values. Zeros need less power and would be faster."""
    rate = matmul_rate(SIZE, SIZE, SIZE, dtype=torch.bfloat16, device=gpu, repeats=100)
    tell("just after it", parts.gpu_state())
    judge_rate(tell, rate, listed_peak(torch.cuda.get_device_name(gpu)))


def judge_rate(tell: Tell, rate: float, listed: float | None) -> None:
    """Compare the matmul rate in FLOP/s with the data sheet's rate if it is known."""
    tell("TFLOP/s in bf16", rate / 1e12)
    if listed is not None:
        tell("share of the data sheet's", rate / listed)
        assert rate <= MOST_SHARE * listed, NOTHING_FIX
        warn_unless(rate >= GOOD_SHARE * listed, tell, CLOCKS_FIX)


def test_copy_ceiling(gpu: torch.device, tell: Tell) -> None:
    """Measure the bytes per second of a large copy of random values."""
    source = torch.randint(-(2**31), 2**31 - 1, (COPIED // 4,), dtype=torch.int32, device=gpu)
    target = torch.empty_like(source)
    rate = 2 * COPIED / min(timed(lambda: target.copy_(source), gpu) for _ in range(10))
    tell("TB/s, read and written", rate / 1e12)
    assert rate <= MOST_COPIED, NOTHING_FIX
