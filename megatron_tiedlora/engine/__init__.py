"""The DeepSpeed integration: its JSON, its topology, the plain and the pipeline runner, and its optimizer states."""
