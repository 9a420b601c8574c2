"""The proof, at start-up, that every armed layer changes the residual stream by exactly the asked delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from steer_kernels.apply_edits import Site, SiteEdits, bind_sites, prepare_edits

SEED = 20
COMPILED_TOLERANCE = 0.2
"""How far the compiled model's answer to an edit may be from the eager one's, relative to its size.

The two round differently, layer by layer; an edit that was dropped, or applied twice, is off by 1.
"""


@dataclass(frozen=True)
class Observation:
    """One run over some tokens.

    before, after: the residual stream [tokens, d_model] around each armed layer's op, as the model's own code sees it;
    empty where the model is compiled and cannot be watched. final: what the model returned.
    """

    before: list[torch.Tensor]
    after: list[torch.Tensor]
    final: torch.Tensor


RunTokens = Callable[[int, bool], Observation]
"""(tokens, compiled) -> what happened. Every token is the same, and on its own: attention contributes nothing."""


@dataclass(frozen=True)
class LayerCheck:
    """layer: decoder layer. error, allowed: largest deviation from the asked delta, and what rounding explains.

    compiled_error: deviation of the compiled model's answer from the eager one's, relative to the answer; None where
    the model is not compiled. passed: the verdict.
    """

    layer: int
    error: float
    allowed: float
    compiled_error: float | None
    passed: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class SelfTestError(RuntimeError):
    """Some armed layer does not do what it should; the server must not start."""


def _site_edits(records: list[dict[str, float]]) -> SiteEdits:
    def column(name: str, dtype: type, neutral: float = 0.0) -> np.ndarray:
        return np.array([record.get(name, neutral) for record in records], dtype=dtype)

    return SiteEdits(
        start=column("start", np.int64),
        stop=column("stop", np.int64),
        read=column("read", np.int64),
        write=column("write", np.int64),
        bias=column("bias", np.float32),
        threshold=column("threshold", np.float32, -np.inf),
        scale=column("scale", np.float32),
        shift=column("shift", np.float32),
        low=column("low", np.float32, -np.inf),
        high=column("high", np.float32, np.inf),
        encoder=column("encoder", np.int64, -1),
        feature=column("feature", np.int64),
        preserve_norm=column("preserve_norm", np.bool_),
    )


def run_self_test(
    layers: tuple[int, ...], d_model: int, dtype: torch.dtype, device: torch.device, run: RunTokens, compiled: bool
) -> list[LayerCheck]:
    """Check every armed layer in two eager forwards and, where the model is compiled, a compiled one.

    Token 0 is left alone. At the i-th armed layer, token 1 + i has a known vector added and token 1 + n + i a known
    direction projected out; nothing else may move. Raises SelfTestError naming the layers that fail.
    """
    n = len(layers)
    tokens = 1 + 2 * n
    bind_sites(())
    try:
        plain = run(tokens, False)
        rows, sites = _test_sites(plain, n, d_model, dtype, device)
        bind_sites(sites)
        eager = run(tokens, False)
        answer = run(tokens, True).final if compiled else None
    finally:
        bind_sites(())
    runs = 2 if compiled else 1
    checks = [
        _check(layer, i, n, rows, plain, eager, answer, ran=sites[i].runs == runs) for i, layer in enumerate(layers)
    ]
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SelfTestError(
            "steering self-test failed: this server would answer as if it steered. "
            + "; ".join(
                f"layer {c.layer}: off by {c.error:.3g}, {c.allowed:.3g} allowed"
                + ("" if c.compiled_error is None else f", compiled model off by {c.compiled_error:.0%}")
                for c in failed
            )
        )
    return checks


def _test_sites(
    plain: Observation, n: int, d_model: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[Site]]:
    """For each site a random vector as large as the stream there, and a random unit direction."""
    generator = torch.Generator().manual_seed(SEED)
    size = torch.stack([before[0].float().norm() / d_model**0.5 for before in plain.before]).cpu()
    vectors = torch.randn(n, d_model, generator=generator) * size[:, None]
    directions = torch.nn.functional.normalize(torch.randn(n, d_model, generator=generator), dim=-1)
    rows = torch.cat([vectors, directions]).to(device=device, dtype=dtype)
    sites = [Site() for _ in range(n)]
    for i, site in enumerate(sites):
        add, project_out = 1 + i, 1 + n + i
        records: list[dict[str, float]] = [
            {"start": add, "stop": add + 1, "read": -1, "write": i, "scale": 1.0, "shift": 1.0},
            {"start": project_out, "stop": project_out + 1, "read": n + i, "write": n + i},
        ]
        site.edits = prepare_edits(_site_edits(records), rows)
    return rows, sites


def _check(
    layer: int,
    i: int,
    n: int,
    rows: torch.Tensor,
    plain: Observation,
    eager: Observation,
    answer: torch.Tensor | None,
    ran: bool,
) -> LayerCheck:
    before, after = eager.before[i].double(), eager.after[i].double()
    vector, direction = rows[i].double(), rows[n + i].double()
    expected = torch.zeros_like(before)
    expected[1 + i] = vector
    expected[1 + n + i] = -(before[1 + n + i] @ direction) * direction
    # Rounding of the op's own sum, and of the stream that is the sum of two tensors in the model's dtype.
    scale = before.abs() + after.abs() + expected.abs() + 1e-2 * before.norm(dim=-1, keepdim=True)
    allowed = 4 * torch.finfo(rows.dtype).eps * scale
    error = (after - before - expected).abs()
    # The first site sees the stream of the plain run; later ones see it where no earlier edit touched the token.
    drift = (before[1 + i] - plain.before[i][1 + i].double()).abs()
    passed = ran and bool((error <= allowed).all()) and bool((drift <= allowed[1 + i]).all())
    compiled_error = None
    if answer is not None:
        pair = [1 + i, 1 + n + i]
        wanted = eager.final[pair].double() - eager.final[:1].double()
        deviation = (answer[pair].double() - answer[:1].double() - wanted).norm(dim=-1)
        compiled_error = float((deviation / wanted.norm(dim=-1).clamp(min=1e-30)).max())
        passed = passed and compiled_error <= COMPILED_TOLERANCE
    return LayerCheck(layer, float(error.max()), float(allowed[1 + i].max()), compiled_error, passed)
