"""The README's examples: blocks marked `run`, each followed by what it printed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EXAMPLE = re.compile(r"```(bash|python) run\n(.*?)```\n```text\n(.*?)```", re.DOTALL)


def examples() -> list[tuple[str, str, str]]:
    """(language, code, output) in order."""
    return EXAMPLE.findall(README.read_text())


def run(language: str, code: str, url: str) -> str:
    """What the example prints when the server is at `url` instead of where the README has it."""
    code = code.replace("http://localhost:8000", url).replace("python3", sys.executable)
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
