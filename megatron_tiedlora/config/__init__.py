"""Settings of every command (typed, frozen), the command line, presets of model shapes, and arithmetic on batches."""
