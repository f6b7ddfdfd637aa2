"""Integrate DeepSpeed: its JSON, its topology, runners with and without a pipeline, and its optimizer states."""
