"""Models of transformers and PEFT on a folder, native adapters for them, and logits of PEFT and of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from support.native_files import write_native
from support.oracle import OracleConfig
from support.tiny_models import EOS_ID, auto_class, random_adapter, write_tiny_model

TARGETS = {"qkv": ("qkv",), "all": ("qkv", "o_proj", "gate_up", "down_proj"), "mlp": ("gate_up", "down_proj")}
# Separate q, k, v, gate and up; and all of them fused, in one stored tensor of each kind.
BASES: dict[str, dict[str, Any]] = {"llama": {"head_dim": 12}, "phi3": {"family": "phi3"}}


def write_bases(root: Path) -> dict[str, Path]:
    """A model folder for each of `BASES`."""
    return {name: write_tiny_model(root / name, **shape) for name, shape in BASES.items()}


def hf_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The transformers model of a folder, with all of its towers."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype, **options).eval()


def nf4_model(folder: Path, *, double: bool = False) -> Any:
    """The same in nf4 by bitsandbytes, which computes in bf16; `double`: with quantised statistics."""
    pytest.importorskip("bitsandbytes", reason="pip install 'megatron_tiedlora[quantised]'")
    from transformers import BitsAndBytesConfig

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **how)
    return hf_model(folder, torch.bfloat16, quantization_config=config, device_map="cpu")


def greedy_tokens(model: Any, prompt: list[int], count: int, *, eos: int | None = None) -> list[int]:
    """What a model of transformers decodes, `count` tokens or those before `eos`."""
    ids = torch.tensor([prompt])
    more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": eos, "pad_token_id": EOS_ID}
    tokens: list[int] = model.generate(ids, max_new_tokens=count, **more)[0, len(prompt) :].tolist()
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    """What PEFT computes with the adapter in `folder`."""
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(hf_model(base), str(folder)))


def our_logits(source: ModelSource, adapter: NativeAdapter | None) -> torch.Tensor:
    """What the package's own model computes for the tokens of `logits_of`."""
    return logits_of(load_model(source, adapter, dtype=torch.float32).predict, torch.arange(24).expand(2, 24))


def write_adapter(
    folder: Path, base: Path, method: str = "tl6", targets: str = "qkv", *, seed: int = 0, scale: float = 0.5
) -> NativeAdapter:
    """A native folder on layers 1 and 3 of 3, with alpha / rank 1.5, none of whose tensors is zero."""
    sizes = OracleConfig.from_folder(base)
    oracle = random_adapter(method, sizes, alpha=6, layers=(1, 3), seed=seed, scale=scale, targets=TARGETS[targets])
    return write_native(folder, base, oracle)


def peft_model(base: Path, config: Any) -> Any:
    """PEFT's model of an adapter config, whose update is not zero and whose vectors differ from entry to entry."""
    from peft import get_peft_model

    torch.manual_seed(3)
    peft = get_peft_model(hf_model(base), config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "vera_lambda" in name:
                parameter.normal_(std=0.7)
    return peft


def lora_model(base: Path, **options: Any) -> Any:
    """PEFT's model of a LoraConfig."""
    from peft import LoraConfig

    return peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))


def vera_model(base: Path, **options: Any) -> Any:
    """PEFT's model of a VeraConfig."""
    from peft import VeraConfig

    return peft_model(base, VeraConfig(task_type="CAUSAL_LM", **options))


def logits_of(model: Callable[..., Any], *positions: torch.Tensor) -> torch.Tensor:
    """Logits of two rows of 24 tokens."""
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(ids, *positions)
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found


def share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
