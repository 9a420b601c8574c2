"""Tensor maths of steering: torch in, torch out. Knows neither vLLM nor HTTP nor checkpoint files."""
