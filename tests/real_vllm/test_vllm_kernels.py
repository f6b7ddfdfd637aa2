"""The GPU path of the plugin without a GPU: vLLM's own wrapper, metadata and shrink, and then the plugin's kernel.

Triton's interpreter runs the kernels of both, in a process of its own: it must be chosen before Triton is imported.
Without pytest: python tests/real_vllm/test_vllm_kernels.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_the_gpu_path_of_vllm_by_the_interpreter() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == 6


def make_wrapper(mapping: tuple[int, ...]) -> Any:
    """vLLM's wrapper for GPUs, which has been told the slot of each token of a batch."""
    from support.tied_updates import SLOTS
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=128)
    wrapper = PunicaWrapperGPU(256, 256, "cpu", lora_config=config)
    ids = [7, 11, 13, 17]  # of the adapters in the slots; 0 is the base
    named = [0 if slot < 0 else ids[slot] for slot in mapping]
    wrapper.update_metadata(LoRAMapping(named, named, is_prefill=True), ids, SLOTS, 320)
    return wrapper


def compare_all() -> list[str]:
    """Compare every rank and every split with fp64, in fp16; half of them compiled, with no break in the graph.

    Raises:
        AssertionError: a value is wrong, or a row of the base has changed.
    """
    from functools import partial

    import torch
    from support.tied_updates import FEW, MANY, SIZES, add_tied_update, check_update, make_update

    from megatron_tiedlora.integrations.vllm import kernels

    done = []
    for number, (rank, slices) in enumerate(SIZES):
        mapping, compiled = (MANY, FEW)[number != 1], number % 2 == 1
        update = make_update(mapping, rank, slices, len(slices) if compiled else 1, torch.float16)
        add = partial(add_tied_update, kernels)
        if compiled:
            torch._dynamo.reset()
            add = torch.compile(add, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            check_update(add, make_wrapper(mapping), update)
        done.append(f"rank {rank}, slices {slices}, {len(mapping)} tokens, {'compiled' if compiled else 'eager'}")
    return done


def main() -> None:
    """Print the comparisons as a line of JSON."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=object()))  # or vLLM's CPU build goes without Triton
    print(json.dumps(compare_all()))


if __name__ == "__main__":
    main()
