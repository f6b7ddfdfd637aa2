"""A plugin that lets vLLM serve tied adapters and VeRA from their own files, without an export."""
