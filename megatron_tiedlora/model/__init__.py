"""The LLaMA family as one flat list of layers."""
