"""A training service: many clients train their adapters of one base at the same time."""
