"""Adapters on transformers' own models: whether a model is their base, which modules they change, and their update."""
