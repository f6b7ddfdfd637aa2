"""The interfaces for other programs: the Python interface, the PEFT method, and uploads to the hub."""
