"""What can be wrong with a checkpoint."""

from __future__ import annotations


class SAEFormatError(ValueError):
    """A checkpoint that cannot be read as what it claims to be, or an option that it does not take."""
