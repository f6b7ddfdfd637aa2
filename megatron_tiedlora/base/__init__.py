"""This package has the code for errors, messages, files and folders. It imports no other package of this library."""
