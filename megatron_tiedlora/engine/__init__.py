"""DeepSpeed: its JSON, topology, the plain and the pipeline runner, and its optimizer states."""
