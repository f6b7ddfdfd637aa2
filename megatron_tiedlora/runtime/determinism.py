"""--deterministic: what makes PyTorch, cuBLAS and NCCL give the same numbers in every run of one layout on GPUs.

Some CUDA kernels add in the order in which their threads arrive, above all in the backward pass of attention. cuBLAS
may split a matmul in another way when streams share its workspace. NCCL's sums inside switches (NVLS, CollNet) promise
no order. On a CPU with gloo there is nothing of this kind: a run gives the same numbers without the setting.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from megatron_tiedlora.base.errors import UserError, shown

# By variable, what makes sums deterministic; the first value is the default.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # PyTorch itself sets NCCL_ALGO=^NVLS in this mode, which leaves NVLSTree; this switches both off (NCCL 2.17 on).
    "NCCL_NVLS_ENABLE": ("0",),
    "NCCL_COLLNET_ENABLE": ("0",),
}


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let every operation of this process be deterministic, or raise; call before CUDA starts.

    PyTorch's own kernels for attention obey, flash_attn's are told when they are chosen (`choose_attention`).

    Raises:
        UserError: the environment says otherwise, by name and value.
    """
    for name, values in VARIABLES.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"--deterministic: {name} is {shown(given)}, with which sums change from run to run; unset it, or set"
                f" it to {' or '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # No value is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
