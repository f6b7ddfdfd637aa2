"""Run the training: start or resume a run, build the engine, take and check the steps, and export the adapters."""
