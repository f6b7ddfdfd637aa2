"""This package reads base weights, reads and writes native adapters, and saves and loads the checkpoints of runs."""
