"""Tied-LoRA as a method of PEFT. Importing this package registers it, so that PEFT's own functions know it:

    import megatron_tiedlora.peft
    model = PeftModel.from_pretrained(base, "RUN/adapter")

A native adapter folder is this method's format, and its tensors A, B, u and v are the method's state dict.
"""

from megatron_tiedlora.peft.registration import register

register()

from megatron_tiedlora.peft.config import TiedLoraConfig  # noqa: E402 (PEFT must know the type first)
from megatron_tiedlora.peft.tuner import TiedLoraLinear, TiedLoraModel  # noqa: E402

__all__ = ["TiedLoraConfig", "TiedLoraLinear", "TiedLoraModel"]
