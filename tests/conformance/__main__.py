"""Install every library, write every fixture again, compare with the committed ones: `python -m tests.conformance`.

Needs nothing but Python: the libraries come into environments of their own under `.conformance/`, which later runs use
again while their requirements stay the same. A library that does not install, or a fixture that differs, makes the run
fail; it never leaves one out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from scripts.install_engine import CUDA_ONLY, TORCH_CPU, TORCH_CPU_INDEX
from tests.conformance.table import say

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".conformance"
FIXTURES = ROOT / "tests" / "sae_models" / "fixtures"


@dataclass(frozen=True)
class Environment:
    """Libraries that agree on their requirements, `requirements-NAME.txt`. families: module to fixture folder."""

    name: str
    families: dict[str, str]

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return Path(__file__).parent / f"requirements-{self.name}.txt"

    @property
    def without_dependencies(self) -> Path:
        """Libraries whose own requirements cannot be met beside this torch; the file may not exist."""
        return Path(__file__).parent / f"requirements-{self.name}.no-deps.txt"


ALL = (
    Environment(
        "sae-lens",
        {
            "sae_lens": "sae_lens",
            "dictionary_learning": "dictionary_learning",
            "eai_sparsify": "sparsify",
            "switch_sae": "switch_sae",
            "gemma_scope": "gemma_scope",
            "gemma_scope_2": "gemma_scope_2",
            "llama_scope": "llama_scope",
            "llamascopium": "llamascopium",
        },
    ),
    Environment("circuit-tracer", {"circuit_tracer": "circuit_tracer"}),
    Environment("mistral-sae", {"mistral_sae": "mistral_sae"}),
)


class StepError(Exception):
    """A command failed; the text is the end of what it said."""


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StepError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def install(environment: Environment) -> None:
    files = [path for path in (environment.requirements, environment.without_dependencies) if path.exists()]
    wanted = "".join([f"{TORCH_CPU}\n", *(path.read_text() for path in files)])
    stamp = ENVIRONMENTS / environment.name / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(ENVIRONMENTS / environment.name, clear=True, with_pip=True)
    pip = (environment.python, "-m", "pip", "--disable-pip-version-check")
    index: tuple[str, ...] = ()
    try:
        run(*pip, "install", "--dry-run", "--no-deps", TORCH_CPU)
    except StepError:
        index = ("--extra-index-url", TORCH_CPU_INDEX)
    run(*pip, "install", *index, TORCH_CPU)
    run(*pip, "install", *index, TORCH_CPU, "-r", environment.requirements)
    if environment.without_dependencies.exists():
        run(*pip, "install", "--no-deps", "-r", environment.without_dependencies)
    # Plain indexes have CUDA builds of these, with which transformers does not import.
    run(*pip, "uninstall", "-y", *CUDA_ONLY)
    stamp.write_text(wanted)


def check(environment: Environment, out: Path) -> bool:
    """Whether everything of one environment is as committed; prints its part of the table."""
    try:
        install(environment)
    except StepError as error:
        for family in environment.families.values():
            say(family, "", environment.requirements.name, f"does not install: {error}")
        return False
    good = True
    for module, family in environment.families.items():
        try:
            run(environment.python, "-m", f"tests.conformance.{module}", out)
        except StepError as error:
            say(family, "", environment.requirements.name, f"cannot be written: {error}")
            good = False
            continue
        compare = (environment.python, "-m", "tests.conformance.compare", out / family, FIXTURES / family)
        good &= subprocess.run(list(map(str, compare)), cwd=ROOT, check=False).returncode == 0
    return good


def main() -> int:
    say("family", "case", "library", "result")
    with tempfile.TemporaryDirectory() as out:
        good = [check(environment, Path(out)) for environment in ALL]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
