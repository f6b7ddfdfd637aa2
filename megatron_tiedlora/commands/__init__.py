"""The commands, one module each: they read settings, call the library and print their results."""
