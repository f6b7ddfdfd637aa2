"""Defines the settings of every command as frozen, typed classes, parses command lines, and computes batch sizes."""
