"""Prints what a bug report needs: versions, extras, devices, the launcher's and the libraries' variables.

Values of variables are shown only for the names and prefixes listed here, none of which holds a secret.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from typing import Any

from megatron_tiedlora.base.atomic import write_text
from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.extras import EXTRAS, missing_modules
from megatron_tiedlora.base.paths import user_cache, user_path
from megatron_tiedlora.base.version import PACKAGE_FOLDER, installed_versions
from megatron_tiedlora.base.wording import bytes_in_words, first_line
from megatron_tiedlora.config.tool_settings import EnvSettings

LIBRARIES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "peft", "datasets", "accelerate", "safetensors"),
    *("huggingface_hub", "numpy", "pydantic", "triton", "flash_attn", "flash_attn_3", "mpi4py"),
    *("rouge-score", "sacrebleu"),
)
# Variables that change what runs: names, and prefixes that end with an underscore.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "NCCL_", "PYTORCH_", "TRITON_", "DS_ACCELERATOR", "DS_ENV_FILE"),
    *("GLOO_", "TORCH_NCCL_", "TORCH_CUDNN_", "TORCH_ALLOW_TF32_", "TORCH_LOGS", "TORCH_EXTENSIONS_DIR"),
    *("TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_", "TORCHELASTIC_"),
    *("OMP_NUM_THREADS", "LD_PRELOAD", "PYTHONPATH", "PYTHONSAFEPATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE"),
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("SLURM_JOB_", "SLURM_STEP_", "SLURM_PROCID", "SLURM_LOCALID"),
    *("OMPI_COMM_WORLD_", "PMI_RANK", "PMI_SIZE", "MEGATRON_TIEDLORA_"),
)
_PREFIXES = tuple(name for name in VARIABLES if name.endswith("_"))
_LONGEST = 200  # characters of a value


def main(settings: EnvSettings) -> int:
    """Print the table or write JSON; returns the exit status."""
    given = settings.json_file
    file = None if given in (None, "-") else user_path(str(given), flag="--json")
    found = environment_report()
    text = json.dumps(found, indent=2)
    if file is not None:
        write_text(file, f"{text}\n")
    show(*(text.split("\n") if given == "-" else _table(found)))
    return 0


def environment_report() -> dict[str, dict[str, Any]]:
    """What is installed and what this machine has, by section."""
    return {
        "versions": {**installed_versions(*LIBRARIES), "system": platform.platform()},
        "paths": {
            "package": str(PACKAGE_FOLDER),
            "python": sys.executable,
            "cache": str(user_cache()),
        },
        "extras": {name: _extra(name) for name in EXTRAS},
        "machine": _machine(),
        "variables": {
            name: value[:_LONGEST]
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith(_PREFIXES)
        },
    }


def _extra(name: str) -> str:
    missing = missing_modules(*(("train", "eval") if name == "demo" else ()), name)
    return f"lacks {', '.join(missing)}" if missing else "installed"


def _machine() -> dict[str, Any]:
    import psutil

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "CPU cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": bytes_in_words(psutil.virtual_memory().total),
    }
    try:  # a broken driver or build is what the report is for
        found.update(_devices())
    except Exception as error:
        found["torch"] = f"{type(error).__name__}: {first_line(error)}"
    return found


def _devices() -> dict[str, Any]:
    """What torch is built with, and the GPUs that it sees."""
    import torch

    found: dict[str, Any] = {"CUDA of torch": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return {**found, "GPUs": "none that torch sees"}
    found["NCCL of torch"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["cuDNN"] = torch.backends.cudnn.version()
    for index in range(torch.cuda.device_count()):
        values = torch.cuda.get_device_properties(index)
        memory = bytes_in_words(values.total_memory)
        found[f"GPU {index}"] = f"{values.name}, sm_{values.major}{values.minor}, {memory}"
    return found


def _table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The sections as lines with one column of names."""
    width = max(len(name) for section in found.values() for name in section) + 2
    lines: list[str] = []
    for title, section in found.items():
        lines += ["", title] if lines else [title]
        lines += [f"  {name:{width}}{value}" for name, value in section.items()]
    return lines
