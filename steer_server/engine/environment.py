"""What the environment must say before vLLM is imported."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

PLUGIN = "steer_server"


def vllm_environment(embedded: bool) -> dict[str, str]:
    """What the environment must say for the plugin to be loaded, keeping what it says already."""
    environment: dict[str, str] = {}
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        # Naming one plugin would switch off the others, so those that load by default are named too.
        groups = (
            "vllm.general_plugins",
            "vllm.platform_plugins",
            "vllm.io_processor_plugins",
            "vllm.stat_logger_plugins",
        )
        names = {point.name for group in groups for point in entry_points(group=group)}
        environment["VLLM_PLUGINS"] = ",".join(sorted(names | {PLUGIN}))
    elif PLUGIN not in named.split(","):
        environment["VLLM_PLUGINS"] = f"{named},{PLUGIN}" if named else PLUGIN
    if embedded and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    return environment


def offline_environment(embedded: bool) -> dict[str, str]:
    """The same for a command that prints a result: standard output is for that."""
    environment = vllm_environment(embedded)
    environment.setdefault("VLLM_LOGGING_STREAM", os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stderr"))
    return environment
