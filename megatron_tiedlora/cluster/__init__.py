"""Start and watch jobs on several hosts, and check the hosts."""
