"""Starting, watching and checking a job on several hosts."""
