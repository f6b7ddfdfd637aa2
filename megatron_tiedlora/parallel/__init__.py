"""Everything that depends on ranks: the grid of ranks, shard declarations, collectives, frozen weights and the loss."""
