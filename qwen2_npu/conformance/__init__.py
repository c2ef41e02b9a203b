"""What the suites and the commands share: operator catalogue, token-level comparison, tiny checkpoint, report."""
