"""The interfaces for other programs: in Python, the method for PEFT, and uploads to the hub."""
