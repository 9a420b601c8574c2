"""The table that a run prints, a line at a time."""

from __future__ import annotations

import sys


def say(family: str, case: str, library: str, result: str) -> None:
    sys.stdout.write(f"{family:<21}{case:<33}{library:<28}{result}\n")
    sys.stdout.flush()
