"""The flat list as something an engine can run: a plain sequence, and deepspeed.initialize."""
