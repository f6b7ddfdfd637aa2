"""Base weights from safetensors, the native adapter, and the checkpoints from which a run resumes."""
