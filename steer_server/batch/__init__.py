"""Offline batches: many rows, one job, each answered exactly once."""
