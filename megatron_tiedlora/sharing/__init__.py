"""Collections of adapters, and their way to others: an index of a folder, model cards, uploads."""
