"""The parts of `tiedlora plan`: every layout of a cluster that a run would accept, its price, and how it is shown."""
