"""The arrows of the house: which package may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Package -> packages of ours that it may import. spec is open to all and imports none.
ALLOWED = {
    "steer_kernels": set(),
    "sae_models": {"steer_kernels"},
    "steer_server.spec": set(),
    "steer_server.catalog": {"sae_models"},
    "steer_server.plan": {"steer_server.catalog", "sae_models"},
    "steer_server.engine": {"steer_server.plan", "steer_server.catalog", "sae_models", "steer_kernels"},
    "steer_server.sae": {
        "steer_server.engine",
        "steer_server.plan",
        "steer_server.catalog",
        "sae_models",
        "steer_kernels",
    },
    "steer_server.batch": {"steer_server.engine", "steer_server.plan", "steer_server.catalog", "sae_models"},
    "steer_server.api": {
        "steer_server.batch",
        "steer_server.engine",
        "steer_server.plan",
        "steer_server.catalog",
        "sae_models",
    },
}
FOLDERS = {
    "steer_kernels": ROOT / "kernels" / "steer_kernels",
    "sae_models": ROOT / "sae_models",
    **{name: ROOT / name.replace(".", "/") for name in ALLOWED if name.startswith("steer_server.")},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package):
    return [path for path in FOLDERS[package].rglob("*.py") if "__pycache__" not in path.parts]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package):
    assert sources(package)
    for path in sources(package):
        for name in imports(path):
            ours = next((p for p in ALLOWED if name == p or name.startswith(f"{p}.")), None)
            allowed = ALLOWED[package] | {package, "steer_server.spec"}
            assert ours is None or ours in allowed, f"{path} imports {name}"


def test_every_package_is_covered():
    found = {f"steer_server.{p.parent.name}" for p in (ROOT / "steer_server").glob("*/__init__.py")}
    assert found == {name for name in ALLOWED if name.startswith("steer_server.")}


def test_one_room_knows_vllm():
    compat = ROOT / "steer_server" / "engine" / "vllm_compat"
    for path in (ROOT / "steer_server").rglob("*.py"):
        if compat not in path.parents:
            named = [name for name in imports(path) if name == "vllm" or name.startswith("vllm.")]
            assert not named, f"{path} imports {named}"


def test_the_request_schema_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, steer_server.spec; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_unpickles():
    for package in (ROOT / "steer_server", ROOT / "sae_models", ROOT / "kernels"):
        for path in package.rglob("*.py"):
            text = path.read_text()
            for forbidden in ("torch.load(", "pickle", "allow_pickle=True", "joblib", "marshal"):
                assert forbidden not in text, f"{path}: {forbidden}"
