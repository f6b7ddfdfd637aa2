"""Measuring a training step, alone, beside PEFT and by layout, and decoding beside transformers."""
