"""Who holds which part of a tensor: the grid of ranks, shard declarations, layers and the loss."""
