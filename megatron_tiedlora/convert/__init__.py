"""Converts adapters to and from other tools' formats: merged checkpoints, PEFT adapters, and the check of both."""
