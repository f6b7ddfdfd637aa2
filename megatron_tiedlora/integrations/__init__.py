"""Provides the Python interface, the PEFT integration, and uploads to the Hugging Face hub."""
