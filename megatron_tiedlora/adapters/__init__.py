"""The tied adapter: its targets, tensors and low-rank update, and how ranks share, sum and gather it."""
