"""DeepSpeed: its JSON, topology, the plain and the pipelined runner, and the state of its optimizers."""
