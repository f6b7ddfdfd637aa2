"""One module per model family: its config, what of it is refused, and its table of weight names."""
