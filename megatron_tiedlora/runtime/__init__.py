"""How a rank starts and ends: process group, heartbeat, signals, rank logs, the run folder, the end of a run."""
