"""Define the base model as one flat list of layers, the model families, and the pipeline stages."""
