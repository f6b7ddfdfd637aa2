"""Serves tied adapters and VeRA adapters in vLLM, as a plugin. Nothing here imports vLLM before vLLM asks for it."""
