"""How long work runs: workers, batches, saved state, locks, memory."""
