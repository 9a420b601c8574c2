"""The wheel that users install, without the checkout: everything is in it, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {
        "steer_kernels", "steer_server", "sae_models",
    }  # fmt: skip
    for needed in (
        "steer_kernels/apply_edits/op.py",
        *(
            f"sae_models/pretrained/smollm2-135m-{layer}/{file}"
            for layer in ("l12", "l15")
            for file in ("sae_weights.safetensors", "cfg.json", "README.md", "features.sqlite")
        ),
        "steer_server/engine/vllm_compat/runner_v1.py",
    ):
        assert needed in names
    assert wheel.stat().st_size < 50 * 2**20


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    """As the Dockerfile installs it, into a folder of its own."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    code = (
        "import sae_models, sys; from sae_models.pretrained import pretrained_for;"
        f"assert sae_models.__file__.startswith({str(target)!r});"
        "print([sae.name for sae in pretrained_for('x/SmolLM2-135M-Instruct')])"
    )
    # -S keeps the editable checkout off the path; the libraries come from this environment.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(target), *libraries]!r}; {code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.stdout.strip() == "['smollm2-135m/l12', 'smollm2-135m/l15']", run.stderr
