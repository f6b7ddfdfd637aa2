"""Start and end ranks: process group, heartbeat, signals, rank logs, run folder, and the end of a run."""
