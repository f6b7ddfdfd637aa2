"""--deterministic: let PyTorch, cuBLAS and NCCL give the same numbers in every run of one layout on GPUs.

Some CUDA kernels add in the order in which their threads arrive, above all in the backward pass of attention. cuBLAS
may split a matmul differently when streams share its workspace. NCCL's sums inside switches (NVLS, CollNet) have no
fixed order. On a CPU with gloo the sums are always deterministic: a run gives the same numbers without the setting.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from megatron_tiedlora.base.errors import UserError, shown

# The values with which sums are deterministic, by variable; the first one is the default.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # In this mode PyTorch sets NCCL_ALGO=^NVLS, which leaves NVLSTree; this disables both (since NCCL 2.17).
    "NCCL_NVLS_ENABLE": ("0",),
    "NCCL_COLLNET_ENABLE": ("0",),
}


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make every operation of this process deterministic, or let it raise; call this before CUDA starts.

    PyTorch's attention kernels obey this; flash_attn's get an argument in `choose_attention`.

    Raises:
        UserError: an environment variable contradicts the setting; the message has its name and value.
    """
    for name, values in VARIABLES.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"--deterministic: {name} is {shown(given)}, so sums would change from run to run; unset it, or set"
                f" it to {' or '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # No value is read before it is written, so filling memory would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
