"""What other programs use: the Python interface, the method for PEFT, and uploads to the hub."""
