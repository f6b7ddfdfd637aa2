"""The tied adapter: its targets, tensors and low-rank update, and the communication between ranks that it needs."""
