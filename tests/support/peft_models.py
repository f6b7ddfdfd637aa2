"""PEFT's own models on a model folder, and logits to compare with theirs. Uses nothing of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peft_model(base: Path, config: Any) -> Any:
    """PEFT's model of an adapter config, whose update is not zero and whose vectors differ from entry to entry."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, config).eval()
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
