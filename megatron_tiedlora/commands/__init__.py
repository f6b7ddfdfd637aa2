"""The commands of tiedlora. They read settings, call the library and print results."""
