"""This package defines the adapter: its targets, tensors and low-rank update, and the communication between ranks."""
