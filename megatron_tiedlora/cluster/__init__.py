"""Start, watch and check a job on several hosts."""
