"""Settings (typed, frozen), presets of model shapes, cross-checks and the engine's JSON."""
