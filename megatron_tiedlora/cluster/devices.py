"""The GPUs of this machine, as the launchers count them."""

from __future__ import annotations

import os

from megatron_tiedlora.base.errors import UserError


def visible_gpus() -> tuple[str, ...]:
    """The launcher's numbers of the GPUs in CUDA_VISIBLE_DEVICES (which `--include` overrides), or else of all GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if named is None or not count:
        return tuple(str(index) for index in range(count))
    names = tuple(name.strip() for name in named.split(","))[:count]
    if not all(name.isdigit() for name in names):
        raise UserError(f"CUDA_VISIBLE_DEVICES={named}: only GPU numbers are supported; write them as in 0,1")
    return names
