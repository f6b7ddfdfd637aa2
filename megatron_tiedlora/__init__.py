"""Tied-LoRA fine-tuning of dense language models on DeepSpeed, exact at any layout."""

__version__ = "0.1.0"
