"""The Python interface; `megatron_tiedlora` exports its names, and imports what they need when they are first used."""
