"""Train adapters: start or resume a run, build the engine, run and check the steps, and export the adapters."""
