"""The typed, frozen settings of every command, the command line, and batch arithmetic."""
