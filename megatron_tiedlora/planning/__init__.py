"""What a layout costs, as arithmetic: stages, operations, memory, messages."""
