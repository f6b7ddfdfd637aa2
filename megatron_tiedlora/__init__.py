"""Tied-LoRA fine-tuning of the LLaMA family on DeepSpeed, exact at any layout."""

__version__ = "0.1.0"
