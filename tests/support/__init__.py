"""What tests share, by purpose: oracles, tiny models, ranks, runs, hosts, and what looks at their results."""
