"""The commands, in one module or a few together: they read settings, call the library and print their results."""
