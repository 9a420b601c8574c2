"""The proof, at start-up, that every armed site changes its stream by exactly the asked delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from sae_models import HookPoint
from steer_kernels.apply_edits import Site, SiteEdits, bind_sites, prepare_edits

SEED = 20
COMPILED_TOLERANCE = 0.2
"""How far the compiled model's answer to an edit may be from the eager one's, relative to its size.

The two round differently, layer by layer; an edit that was dropped, or applied twice, is off by 1.
"""
MIN_EFFECT = 0.1
"""How much an added vector must change what the model returns, relative to its size, for that comparison to mean much.

A vector as large as the stream does where it is added to the residual stream, but not always elsewhere: there it grows
tenfold until it does, `MAX_GROWTHS` times at most.
"""
MAX_GROWTHS = 5


@dataclass(frozen=True)
class Observation:
    """One run over some tokens.

    before, after: the stream [tokens, d_model] around each site's op, as the model's own code sees it; None where the
    model is compiled and cannot be watched, or never came by. in_two_parts: where the stream is the sum of two tensors.
    final: what the model returned [tokens, d_model]; of a pipeline stage, the stream that it hands on.
    """

    before: list[torch.Tensor | None]
    after: list[torch.Tensor | None]
    in_two_parts: list[bool]
    final: torch.Tensor


RunTokens = Callable[[int, bool, list[torch.Tensor] | None], Observation]
"""(tokens, compiled, added) -> what happened. Every token is the same, and on its own: attention contributes nothing.

added: [tokens, d_model] for each site, added in an eager run to the part of its stream that the op does not write.
"""


@dataclass(frozen=True)
class SiteCheck:
    """site: hook point. layer: its decoder layer. error, allowed: largest deviation from the asked delta, and what
    rounding explains.

    compiled_error: deviation of the compiled model's answer from the eager one's, relative to the answer; None where
    the model is not compiled. passed: the verdict.
    """

    site: str
    layer: int
    error: float
    allowed: float
    compiled_error: float | None
    passed: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        where = f"layer {self.layer}" if self.site == str(HookPoint(self.layer)) else self.site
        compiled = "" if self.compiled_error is None else f", compiled model off by {self.compiled_error:.0%}"
        return f"{where}: off by {self.error:.3g}, {self.allowed:.3g} allowed{compiled}"


class SelfTestError(RuntimeError):
    """Some armed site does not do what it should; the server must not start."""


def site_edits(records: list[dict[str, float]]) -> SiteEdits:
    """Edit rows from what is said of each; what is left out is 0, no bound, no encoder, the stream itself."""

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
        norm=column("norm", np.int64),
        source=column("source", np.int64, -1),
        preserve_norm=column("preserve_norm", np.bool_),
        gate=column("gate", np.int64, -1),
    )


class _Layout:
    """Which token tries what. Token 0 is left alone.

    pairs: (read site, write site) of the layers that have an MLP's input and its output armed, as transcoders do.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        points = [HookPoint.parse(site) for site in sites]
        number = {point: i for i, point in enumerate(points)}
        self.sites = len(points)
        self.on_residual_stream = [point.kind in ("resid_pre", "resid_post") for point in points]
        self.pairs = [
            (number[HookPoint(point.layer, "mlp_in")], i)
            for i, point in enumerate(points)
            if point.kind == "mlp_out" and HookPoint(point.layer, "mlp_in") in number
        ]
        self.tokens = 1 + 2 * self.sites + len(self.pairs)

    def add(self, site: int) -> int:
        return 1 + site

    def project_out(self, site: int) -> int:
        return 1 + self.sites + site

    def read_elsewhere(self, pair: int) -> int:
        return 1 + 2 * self.sites + pair


class _Rows:
    """What is added at each site, the direction that is projected out there, and what each pair reads along.

    size: [sites], of the vectors' components, which are random. A direction is a random one, turned towards the stream:
    what is projected out must be more than rounding. A pair reads along the stream itself, so that f is about 1.
    """

    def __init__(self, layout: _Layout, before: list[torch.Tensor], size: torch.Tensor, dtype: torch.dtype) -> None:
        device, d_model = before[0].device, before[0].shape[-1]
        generator = torch.Generator().manual_seed(SEED)
        vectors = torch.randn(layout.sites, d_model, generator=generator) * size[:, None]
        directions = torch.nn.functional.normalize(torch.randn(layout.sites, d_model, generator=generator), dim=-1)
        directions += torch.nn.functional.normalize(torch.stack([stream[0].float() for stream in before]).cpu(), dim=-1)
        directions = torch.nn.functional.normalize(directions, dim=-1)
        streams = [before[read][:1].float().cpu() for read, _ in layout.pairs]
        along = [stream / stream.square().sum().clamp(min=1e-30) for stream in streams]
        self.rows = torch.cat([vectors, directions, *along]).to(device=device, dtype=dtype)
        self.layout = layout

    def vector(self, site: int) -> torch.Tensor:
        return self.rows[site].double()

    def direction(self, site: int) -> torch.Tensor:
        return self.rows[self.layout.sites + site].double()

    def pair_direction(self, pair: int) -> torch.Tensor:
        return self.rows[2 * self.layout.sites + pair].double()

    def test_sites(self) -> list[Site]:
        layout, n = self.layout, self.layout.sites
        records: list[list[dict[str, float]]] = []
        for i in range(n):
            add, out = layout.add(i), layout.project_out(i)
            records.append(
                [
                    {"start": add, "stop": add + 1, "read": -1, "write": i, "scale": 1.0, "shift": 1.0},
                    {"start": out, "stop": out + 1, "read": n + i, "write": n + i},
                ]
            )
        for j, (read, write) in enumerate(layout.pairs):
            token = layout.read_elsewhere(j)
            pair = {"start": token, "stop": token + 1, "read": 2 * n + j, "write": write, "scale": 2.0, "source": read}
            records[write].append(pair)
        sites = [Site() for _ in range(n)]
        for site, its_records in zip(sites, records, strict=True):
            site.edits = prepare_edits(site_edits(its_records), self.rows)
            for reads in site.edits.remote:
                sites[reads.source].reads.append(reads)
        return sites


def run_self_test(sites: Sequence[str], dtype: torch.dtype, run: RunTokens, compiled: bool) -> list[SiteCheck]:
    """Check every armed site in eager forwards and, where the model is compiled, a compiled one.

    Each site has one token at which a known vector is added and one at which a known direction is projected out; each
    pair of an MLP's input and output has one at which the input is read and the output written. Nothing else may move.
    Where the stream is the sum of two tensors, adding to the one or the other must be the same to the model.
    dtype: of the model. Raises SelfTestError naming the sites that fail.
    """
    if not sites:
        return []
    layout = _Layout(sites)
    bind_sites(())
    try:
        plain = run(layout.tokens, False, None)
        before = _seen(plain.before, sites)
        size = torch.stack([stream[0].float().norm() / stream.shape[-1] ** 0.5 for stream in before]).cpu()
        # Attention adds nothing in this test, so there may be no stream to take the size from.
        size = torch.where(size > 0, size, size.max())
        for growth in range(MAX_GROWTHS + 1):
            rows = _Rows(layout, before, size, dtype)
            test_sites = rows.test_sites()
            bind_sites(test_sites)
            eager = run(layout.tokens, False, None)
            weak = [_effect(eager.final, layout.add(i)) < MIN_EFFECT for i in range(layout.sites)]
            if not any(weak) or growth == MAX_GROWTHS:
                break
            size = torch.where(torch.tensor(weak), size * 10, size)
        answer = run(layout.tokens, True, None).final if compiled else None
    finally:
        bind_sites(())
    runs = 2 if compiled else 1
    checks = [
        _check(site, i, rows, before, eager, answer, ran=test_sites[i].runs == runs) for i, site in enumerate(sites)
    ]
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SelfTestError(
            "steering self-test failed: this server would answer as if it steered. " + "; ".join(map(str, failed))
        )
    _check_sums(rows, sites, eager, run)
    return checks


def _seen(streams: list[torch.Tensor | None], sites: Sequence[str]) -> list[torch.Tensor]:
    missing = [site for site, stream in zip(sites, streams, strict=True) if stream is None]
    if missing:
        raise SelfTestError(f"steering self-test failed: the model does not come by {', '.join(missing)}")
    return [stream for stream in streams if stream is not None]


def _check_sums(rows: _Rows, sites: Sequence[str], eager: Observation, run: RunTokens) -> None:
    """Raise SelfTestError where the op reads a sum that is not the stream: some layers return what came in beside their
    complete output."""
    if not any(eager.in_two_parts):
        return
    layout = rows.layout
    added = []
    for i in range(layout.sites):
        added.append(torch.zeros(layout.tokens, rows.rows.shape[-1], dtype=rows.rows.dtype, device=rows.rows.device))
        added[i][layout.add(i)] = rows.rows[i]
    final = run(layout.tokens, False, added).final
    wrong = []
    for i in (i for i in range(layout.sites) if eager.in_two_parts[i]):
        wanted, found = ((seen[layout.add(i)] - seen[0]).double() for seen in (eager.final, final))
        if float((found - wanted).norm()) > COMPILED_TOLERANCE * float(wanted.norm()):
            wrong.append(sites[i])
    if wrong:
        raise SelfTestError(
            f"steering self-test failed: the stream at {', '.join(wrong)} is not the sum of the two tensors that the "
            "model returns there, so it would be misread; this architecture is not supported"
        )


def _effect(final: torch.Tensor, token: int) -> float:
    """How far what the model returned for `token` is from what it returned for token 0, relative to that."""
    plain = final[0].double()
    return float((final[token].double() - plain).norm() / plain.norm().clamp(min=1e-30))


def _check(
    site: str,
    i: int,
    rows: _Rows,
    plain: list[torch.Tensor],
    eager: Observation,
    answer: torch.Tensor | None,
    ran: bool,
) -> SiteCheck:
    layout = rows.layout
    befores, afters = _seen(eager.before, [site] * layout.sites), _seen(eager.after, [site] * layout.sites)
    before, after = befores[i].double(), afters[i].double()
    add, out, direction = layout.add(i), layout.project_out(i), rows.direction(i)
    expected = torch.zeros_like(before)
    expected[add] = rows.vector(i)
    expected[out] = -(before[out] @ direction) * direction
    # Rounding of the op's own sum, and of the stream that is the sum of two tensors in the model's dtype.
    scale = before.abs() + after.abs() + 1e-2 * before.norm(dim=-1, keepdim=True)
    rounding = torch.zeros_like(before)
    compared = [add, out] if layout.on_residual_stream[i] else [add]
    for j, (read, write) in enumerate(layout.pairs):
        if write == i:
            token = layout.read_elsewhere(j)
            f = befores[read][token].double() @ rows.pair_direction(j)
            expected[token] = f * rows.vector(i)
            # And of the dot product that f is, in float32.
            rounding[token] = 1e-5 * expected[token].abs()
            compared.append(token)
    allowed = 4 * torch.finfo(rows.rows.dtype).eps * (scale + expected.abs()) + rounding
    error = (after - before - expected).abs()
    # The first site sees the stream of the plain run; later ones see it where no earlier edit touched the token.
    drift = (before[add] - plain[i][add].double()).abs()
    passed = ran and bool((error <= allowed).all()) and bool((drift <= allowed[add]).all())
    compiled_error = None
    if answer is not None:
        wanted = eager.final[compared].double() - eager.final[:1].double()
        deviation = (answer[compared].double() - answer[:1].double() - wanted).norm(dim=-1)
        compiled_error = float((deviation / wanted.norm(dim=-1).clamp(min=1e-30)).max())
        passed = passed and compiled_error <= COMPILED_TOLERANCE
    return SiteCheck(
        site, HookPoint.parse(site).layer, float(error.max()), float(allowed[add].max()), compiled_error, passed
    )
