"""The one room with vLLM's private names. Written for vLLM 0.32; each module is one seam with a test of its own."""

VLLM_VERSION = "0.32.0"
"""The release that the seams were written and tested against."""
