"""HTTP: what carries steering in, what carries receipts out, and the steering routes."""
