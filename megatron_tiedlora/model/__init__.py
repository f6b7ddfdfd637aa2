"""The base model as one flat list of layers, its families, and the stages made of it."""
