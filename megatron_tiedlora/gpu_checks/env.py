"""Part env: what is installed, what the package will use and why, and the device's peak matmul and copy rates."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from megatron_tiedlora.base.version import installed_versions
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.gpu_checks.package import attention_choice, compiler_failure, compute_dtype
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.planning.cards import listed_peak
from megatron_tiedlora.runtime.process_group import gpu_name
from megatron_tiedlora.training.throughput import matmul_rate, timed

OLDEST_TORCH = (2, 10)  # as in pyproject.toml
PACKAGES = ("deepspeed", "triton", "flash_attn", "flash_attn_3", "transformers", "pydantic", "numpy")
# Prefixes of variables that change what runs or how a failure shows.
VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "DS_", "OMP_NUM_THREADS", "LD_PRELOAD")
SIZE, COPIED = 8192, 2**30  # size of the matmul, and bytes of the copy
HEAD_DIM = 128
# Shares of a data sheet's matmul FLOP/s, and TB/s of a copy: a faster device has not computed anything.
GOOD_SHARE, MOST_SHARE, MOST_COPIED = 0.6, 1.2, 40.0
ATTENTION_FIX = (
    "packed rows will be slow: correct what the reason names, upgrade torch, or install flash_attn (docs/gpu.md)"
)
NOTHING_FIX = "no device is that fast: it computed nothing, so check the driver; the times below are meaningless"
INSTALL_FIX = "install PyTorch for the driver's CUDA version: https://pytorch.org/get-started/locally"


def why_no_gpu() -> str | None:
    """Why torch sees no GPU, in one line; None if it sees one."""
    if torch.cuda.is_available():
        accelerator = os.environ.get("DS_ACCELERATOR", "cuda")
        return None if accelerator == "cuda" else f"DS_ACCELERATOR is {accelerator}, so ranks use no GPU; unset it"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; {INSTALL_FIX}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty; unset it"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda}: {first_line(error)}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU; check nvidia-smi"


def count_gpus() -> int:
    """How many GPUs torch sees; this process does not use them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check(report: Report, options: CheckOptions) -> None:
    """Run the part; without a GPU only report what is installed."""
    _software(report)
    missing = why_no_gpu() if options.on_gpu else None
    if missing is not None:
        report.add("GPU", "fail", why=missing, fix="see the line above; docs/gpu.md lists what a GPU machine needs")
        return
    device = torch.device(options.device)
    if options.on_gpu:
        _hardware(report)
    _choices(report, device)
    if options.on_gpu:
        with report.attempt("ceilings"):
            _ceilings(report, device)


def _software(report: Report) -> None:
    report.tell("python", platform.python_version(), why=platform.platform())
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    fix = f"upgrade torch; {INSTALL_FIX}"
    report.expect("torch", found >= OLDEST_TORCH, torch.__version__, expected=f">= {oldest}", fix=fix)
    report.tell("CUDA of torch", torch.version.cuda or "none")
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    report.tell("cuDNN", _dotted(cudnn) if cudnn else "none")
    report.tell("NCCL of torch", nccl_version() or "none")
    versions = installed_versions(*PACKAGES)
    for name in PACKAGES:
        report.tell(name, versions.get(name, "not installed"))
    precision = torch.get_float32_matmul_precision()
    report.expect(
        "fp32 matmuls",
        precision == "highest",
        precision,
        expected="highest",
        otherwise="warn",
        why="" if precision == "highest" else "runs with --dtype fp32 would round to TF32; the other parts do not",
        fix="unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some containers set",
    )
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            report.tell(f"${name}", os.environ[name][:200])


def nccl_version() -> str | None:
    """The version of the NCCL that torch is built with; `loaded_nccl` may find another, preloaded one."""
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a build without NCCL
        return None


def _dotted(number: int) -> str:
    """91900 -> 9.19.0, as cuDNN has counted since 9.0."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _hardware(report: Report) -> None:
    driver = _nvidia_smi(
        "driver_version,power.limit,clocks.max.sm,mig.mode.current,ecc.errors.uncorrected.volatile.total"
    )
    report.tell("driver", driver or "unknown", why="driver, power limit, SM clock, MIG, ECC errors; from nvidia-smi")
    for index in range(torch.cuda.device_count()):
        with report.attempt(f"GPU {index}"):
            values = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            report.expect(
                f"GPU {index}",
                (values.major, values.minor) >= (8, 0),
                f"{values.name}, sm_{values.major}{values.minor}, {total / 2**30:.0f} GiB",
                expected=">= sm_80",
                otherwise="warn",
                fix="GPUs before Ampere have no fast bf16; give --dtype fp32, and expect a slow run",
            )
            report.at_least(
                f"GPU {index}: free memory",
                free / total,
                0.9,
                otherwise="warn",
                fix="end other processes on the GPU (nvidia-smi); the figures below are from a shared GPU",
            )


def _nvidia_smi(fields: str) -> str:
    """nvidia-smi's values for torch's first GPU; '' if it gives none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={gpu_name(torch.device('cuda', 0))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _choices(report: Report, device: torch.device) -> None:
    """The attention and kernels that the package chooses on this device."""
    for dtype in dict.fromkeys((compute_dtype(device), torch.float32)):
        name = f"attention in {str(dtype).removeprefix('torch.')}"
        with report.attempt(name):
            chosen, why, is_fused = attention_choice(device, dtype, HEAD_DIM)
            report.expect(name, is_fused, chosen, expected="one call", why=why, fix=ATTENTION_FIX, otherwise="warn")
    if device.type == "cpu":
        report.skip("compiled kernels", "this is not a check of a CPU's compiler")
        return
    with report.attempt("compiled kernels"):
        failure = compiler_failure(device)
        report.expect(
            "compiled kernels",
            failure is None,
            "compiled" if failure is None else "not compiled",
            expected="compiled",
            otherwise="warn",
            why=failure or "",
            fix=_compiler_fix(),
        )


def _compiler_fix() -> str:
    """The fix for a missing C compiler or missing Python headers, which Triton needs to build its launcher."""
    lacking = [] if shutil.which("gcc") or shutil.which("cc") else ["a C compiler (gcc)"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        lacking.append("Python's headers (python3-dev)")
    what = " and ".join(lacking) or "what the reason names"
    return f"install {what}; without it kernels are not compiled, and a step takes about a third longer"


def _ceilings(report: Report, device: torch.device) -> None:
    """Measure a large matmul and a large copy of random numbers: zeros take less power and would be faster."""
    rate = matmul_rate(SIZE, SIZE, SIZE, dtype=torch.bfloat16, device=device, repeats=10)
    _matmul_ceiling(report, rate, listed_peak(torch.cuda.get_device_name(device)))
    source = torch.randint(-(2**31), 2**31 - 1, (COPIED // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    copied, why = 2 * COPIED / seconds / 1e12, "read and written together"
    report.at_most("copy ceiling", copied, MOST_COPIED, unit="TB/s", why=why, fix=NOTHING_FIX)


def _matmul_ceiling(report: Report, rate: float, listed: float | None) -> None:
    """Compare the matmul rate with the data sheet's, if that is known."""
    name, unit = "matmul ceiling, bf16", "TFLOP/s"
    fix = "check nvidia-smi -q -d CLOCK,POWER,TEMPERATURE: clocks, power limit, heat, another process"
    if listed is None:
        report.tell(name, rate / 1e12, unit, why="this device's data sheet is unknown")
    elif rate > MOST_SHARE * listed:
        report.at_most(name, rate / 1e12, MOST_SHARE * listed / 1e12, unit=unit, fix=NOTHING_FIX)
    else:
        report.at_least(name, rate / 1e12, GOOD_SHARE * listed / 1e12, unit=unit, fix=fix, otherwise="warn")
