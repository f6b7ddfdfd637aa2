"""Implement everything that depends on ranks: the grid, sharding, collectives, frozen weights and the loss."""
