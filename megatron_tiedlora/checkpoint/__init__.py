"""Base weights from safetensors, the native adapter, and the state a run resumes from."""
