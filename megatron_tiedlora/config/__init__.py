"""Settings of every command (typed, frozen), the command line, and arithmetic on batches."""
