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


CONVERTS = ROOT / "steer_server" / "sae" / "convert_pickle.py"
"""The one module that opens pickles, in a process of its own."""

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def calls(path):
    """(dotted name, keyword arguments) of every call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_unpickles():
    for package in (ROOT / "steer_server", ROOT / "sae_models", ROOT / "kernels"):
        for path in package.rglob("*.py"):
            for name in imports(path):
                assert name.partition(".")[0] not in UNPICKLERS, f"{path} imports {name}"
                assert name != "torch.load", f"{path} imports {name}"
            for name, keywords in calls(path):
                assert keywords.get("allow_pickle", "False") == "False", f"{path}: {name}(allow_pickle=...)"
                assert name != "torch.load" or path == CONVERTS, f"{path} calls torch.load"


def test_the_one_module_that_unpickles_reads_tensors_only():
    (keywords,) = (keywords for name, keywords in calls(CONVERTS) if name == "torch.load")
    assert keywords["weights_only"] == "True"


def test_nothing_imports_the_module_that_unpickles():
    """It is run as a process; an import of it anywhere would bring pickles to where it is imported."""
    for package in (ROOT / "steer_server", ROOT / "sae_models", ROOT / "kernels"):
        for path in package.rglob("*.py"):
            named = [name for name in imports(path) if "convert_pickle" in name.split(".")]
            assert not named, f"{path} imports {named}"
            runs = "convert_pickle" in path.read_text() and path != CONVERTS
            assert not runs or path == CONVERTS.with_name("convert.py"), f"{path} names convert_pickle"


def test_a_server_does_not_have_the_module_that_unpickles():
    import subprocess
    import sys

    code = (
        "import sys, steer_server.cli, steer_server.plugin, steer_server.api.middleware, steer_server.engine.worker;"
        "import steer_server.sae.commands, steer_server.sae.convert;"
        "sys.exit(any('convert_pickle' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
