"""The lowest layer: errors, messages, files and folders. It imports no other package of this library."""
