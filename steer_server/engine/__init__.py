"""The vLLM side: admission, row bank, per-step tables, receipts, self-test."""
