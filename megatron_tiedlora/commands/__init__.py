"""Implement the commands of tiedlora: read settings, call the library and print results."""
