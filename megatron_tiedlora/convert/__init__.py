"""Converts adapters to and from the formats of other tools (merged checkpoints, PEFT adapters), and checks exports."""
