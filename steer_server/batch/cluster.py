"""A Ray cluster, as it was asked for. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """address: None starts Ray on this machine. replicas: engines at a time, each in an actor of its own. gpus: that
    each replica takes."""

    address: str | None
    replicas: int
    gpus: int


TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")
PIPELINE_PARALLEL = ("--pipeline-parallel-size", "-pp")


def gpus_per_replica(flags: list[str]) -> int:
    """That one engine takes, by vLLM's flags: as many as it has tensor-parallel ranks in all its pipeline stages."""
    return _count(flags, TENSOR_PARALLEL) * _count(flags, PIPELINE_PARALLEL)


def _count(flags: list[str], names: tuple[str, ...]) -> int:
    """The value of the flag that has one of `names`, 1 where it is not given."""
    for i, flag in enumerate(flags):
        name, separator, value = flag.partition("=")
        if name.replace("_", "-") in names:
            return int(value if separator else flags[i + 1])
    return 1
