"""Which rank holds which shard of a tensor: the grid of ranks, shard declarations, collectives, layers and the loss."""
