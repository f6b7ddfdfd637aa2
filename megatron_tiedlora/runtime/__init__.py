"""This package starts and ends ranks: process group, heartbeat, signals, rank logs, run folder, and end of a run."""
