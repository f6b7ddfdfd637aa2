"""How a rank starts and ends: process group, heartbeat, signals, logs of ranks, the run folder, the end of a run."""
