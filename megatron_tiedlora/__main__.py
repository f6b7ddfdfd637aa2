"""Run the command `tiedlora` as `python -m megatron_tiedlora`."""

from megatron_tiedlora.commands.front import main

if __name__ == "__main__":
    main()
