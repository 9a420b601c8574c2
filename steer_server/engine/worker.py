"""Steering inside a worker: which rows act on which tokens of the forward that is about to run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from sae_models import SAE
from steer_kernels.apply_edits import (
    MAX_RANKED,
    CapturingSite,
    Room,
    Site,
    SiteEdits,
    StepTable,
    TableEdits,
    TokenNorm,
    TopKEncoder,
    bind_sites,
    prepare_edits,
)
from steer_kernels.triton_devices import runs_triton
from steer_server.catalog import open_catalog
from steer_server.engine.config import ConfigError, SteeringConfig
from steer_server.engine.row_bank import Row, RowBank
from steer_server.plan import DecoderRow, EncoderRow, InlineRow, Plan, RowRef

NORMS = {"none": TokenNorm.NONE, "layer_norm": TokenNorm.LAYER_NORM, "constant_norm": TokenNorm.CONSTANT_NORM}


@dataclass(frozen=True)
class StepReport:
    """What one forward did.

    spans: positions [start, end) computed with their edits, by request. missing_sites: sites that had work in this
    forward and did not do it, here or on an earlier pipeline stage.
    """

    spans: dict[str, tuple[int, int]]
    missing_sites: list[str]


@dataclass(frozen=True)
class _Request:
    plan: Plan
    prompt_len: int
    refs: frozenset[RowRef]


@dataclass(frozen=True)
class _Edits:
    """Edits of requests in a batch, their rows in the bank.

    first, end: the positions of its sequence that an edit targets. site: where it acts, ascending. owner: whose it is,
    as a place in the batch's steered requests. rows: everything else; its spans are filled in for each forward.
    """

    first: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    site: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    rows: SiteEdits

    @staticmethod
    def concatenate(parts: list[_Edits]) -> _Edits:
        site = np.concatenate([part.site for part in parts])
        order = np.argsort(site, kind="stable")
        return _Edits(
            first=np.concatenate([part.first for part in parts])[order],
            end=np.concatenate([part.end for part in parts])[order],
            site=site[order],
            owner=np.repeat(np.arange(len(parts)), [len(part.first) for part in parts])[order],
            rows=SiteEdits.concatenate([part.rows for part in parts]).take(order),
        )


class WorkerSteering:
    """The row bank, the sites and the requests of one worker.

    config: its `sites` are those of this worker. elsewhere: those of other pipeline stages, whose edits are theirs.
    Raises ConfigError for an SAE that reads on one stage and writes on another.
    """

    def __init__(
        self,
        config: SteeringConfig,
        dtype: torch.dtype,
        device: torch.device,
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        self.config = config
        self._elsewhere = elsewhere
        catalog = open_catalog(config.saes, config.d_model, config.layers)
        for name, sae in catalog.saes.items():
            _refuse_across_stages(name, sae, elsewhere)
        self._saes: dict[str, SAE] = catalog.by_hash()
        self.bank = RowBank(config.rows, config.d_model, dtype, device)
        self.encoders, self._encoder_index = _encoders(self._saes, config.sites, device)
        self.table: StepTable | None = None
        """Where the device runs Triton's kernels: the edits that they apply."""
        if runs_triton(device):
            self.table = StepTable(self.bank.rows, len(config.sites), self.encoders, _room(config))
        self.sites: list[Site] = [Site() for _ in config.sites]
        self._capturing: list[CapturingSite] = []
        self._site_number = {site: i for i, site in enumerate(config.sites)}
        self._requests: dict[str, _Request] = {}
        self._batch: dict[str, _Edits] = {}
        self._edits: _Edits | None = None
        self._table_key: tuple[bytes, ...] | None = None
        self._active: list[int] = []
        """Sites that edit in the forward at hand."""
        self._touched: set[int] = set()
        """Those, and the sites that they read."""
        self._spans: dict[str, tuple[int, int]] = {}
        self.missing_before: list[str] = []
        """Sites of earlier pipeline stages that had work in the forward at hand and did not do it."""
        self._report: StepReport | None = None

    @property
    def nbytes(self) -> int:
        """Memory held for steering on the device."""
        table = 0 if self.table is None else self.table.nbytes
        return self.bank.nbytes + table + sum(encoder.nbytes for encoder in self.encoders)

    @property
    def has_work(self) -> bool:
        """Whether a forward needs its sites armed."""
        return bool(self._requests) or bool(self._capturing)

    def steers_any(self, request_ids: Iterable[str]) -> bool:
        """Whether one of these requests has edits."""
        return any(request_id in self._requests for request_id in request_ids)

    def capture(self, sites: Collection[str]) -> None:
        """Keep the stream that leaves `sites` from the next forward on, of no sites: stop. Forgets what was kept.

        Raises ValueError for a site that is not armed.
        """
        unknown = set(sites) - set(self.config.sites)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} cannot be captured; armed: {', '.join(self.config.sites)}")
        self._clear_table()
        self.sites = [CapturingSite() if site in sites else Site() for site in self.config.sites]
        self._capturing = [site for site in self.sites if isinstance(site, CapturingSite)]

    def take_captured(self) -> list[torch.Tensor]:
        """For each captured site, in their order, the stream of all forwards since the last call: [tokens, d_model]."""
        taken = []
        for site in self._capturing:
            taken.append(torch.cat(site.captured) if site.captured else torch.zeros(0, self.config.d_model))
            site.captured = []
        return taken

    def add_request(self, request_id: str, plan: Plan, prompt_len: int) -> None:
        mine = plan.without(self._elsewhere)
        self._requests[request_id] = _Request(mine, prompt_len, mine.row_refs())

    def remove_request(self, request_id: str) -> None:
        """Forget a finished request; its rows leave with the batch that it is no longer part of."""
        if request_id in self._batch:
            self._enter([i for i in self._batch if i != request_id])
        self._requests.pop(request_id, None)

    def begin_step(
        self, request_ids: Sequence[str], starts: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]
    ) -> None:
        """Arm the sites for a forward over the tokens of `request_ids`, laid out one request after the other.

        starts: the position of each request's first token in this forward. counts: how many tokens it has.
        """
        index = [i for i, request_id in enumerate(request_ids) if request_id in self._requests]
        ids = [request_ids[i] for i in index]
        if ids != list(self._batch):
            self._enter(ids)
        start = np.asarray(starts, dtype=np.int64)[index]
        count = np.asarray(counts, dtype=np.int64)[index]
        token = (np.cumsum(counts, dtype=np.int64) - counts)[index]
        self._spans = {request_id: (int(a), int(a + n)) for request_id, a, n in zip(ids, start, count, strict=True)}
        self._fill(start, count, token)
        for i in self._touched:
            self.sites[i].start_forward()
        for site in self._capturing:
            site.tokens = int(np.sum(counts))
        bind_sites(self.sites)

    def end_step(self) -> None:
        """Disarm the sites: whatever vLLM runs between steps (warm-up, dummy batches) is not steered."""
        bind_sites(())
        missing = [self.config.sites[i] for i in self._active if self.sites[i].runs != 1]
        self._report = StepReport(self._spans, [*self.missing_before, *missing]) if self._spans else None

    def take_report(self) -> StepReport | None:
        """What the last forward did, once; None where it held no steered request."""
        report, self._report = self._report, None
        return report

    def _fill(self, start: npt.NDArray[np.int64], count: npt.NDArray[np.int64], token: npt.NDArray[np.int64]) -> None:
        if self._edits is None:
            return
        edits = self._edits
        first = np.maximum(edits.first, start[edits.owner])
        end = np.minimum(edits.end, (start + count)[edits.owner])
        acting = first < end
        offset = (token - start)[edits.owner]
        token_start, token_stop = (first + offset)[acting], (end + offset)[acting]
        key = (acting.tobytes(), token_start.tobytes(), token_stop.tobytes())
        if key == self._table_key:
            # The same edits on the same rows of the batch as in the last step, as in most of decoding.
            return
        self._clear_table()
        self._table_key = key
        everything = bool(acting.all())
        rows = edits.rows if everything else edits.rows.take(acting)
        site, owner = (edits.site, edits.owner) if everything else (edits.site[acting], edits.owner[acting])
        rows = replace(rows, start=token_start, stop=token_stop)
        self._active = np.unique(site).tolist()
        self._touched.update(self._active)
        if self.table is None:
            self._prepare(rows, site)
            return
        # Rows of one site are applied together: those of a request that ranks very many, by whole SAEs.
        ranked = np.zeros((len(self.sites), len(start)), dtype=np.int64)
        np.add.at(ranked, (site, owner), rows.encoder >= 0)
        many = ranked.max(axis=1)[site] > MAX_RANKED
        if many.any():
            self._prepare(rows.take(many), site[many])
        if not many.all():
            self._tabulate(self.table, rows.take(~many), site[~many], owner[~many])

    def _prepare(self, rows: SiteEdits, site: npt.NDArray[np.int64]) -> None:
        """Give `rows`, sorted by the site where they are written, to the torch path."""
        active, begins = np.unique(site, return_index=True)
        for i, begin, end in zip(active.tolist(), begins, np.append(begins, len(site))[1:], strict=True):
            prepared = prepare_edits(rows.part(begin, end), self.bank.rows, self.encoders)
            self.sites[i].edits = prepared
            for reads in prepared.remote:
                self.sites[reads.source].reads.append(reads)
                self._touched.add(reads.source)

    def _tabulate(
        self, table: StepTable, rows: SiteEdits, site: npt.NDArray[np.int64], owner: npt.NDArray[np.int64]
    ) -> None:
        """Give `rows` to the Triton kernel."""
        table.fill(rows, site, np.unique(owner, return_inverse=True)[1])
        written = set(site.tolist())
        at: dict[int, TableEdits] = {}
        # In the order of a forward: what is read for a site is read before it.
        for i in sorted(written | set(rows.source[rows.source >= 0].tolist())):
            sources = np.unique(rows.source[(site == i) & (rows.source >= 0)]).tolist()
            at[i] = TableEdits(table, i, [at[source] for source in sources])
            if i in written:
                self.sites[i].edits = at[i]
            else:
                self.sites[i].reads.append(at[i])
                self._touched.add(i)

    def _clear_table(self) -> None:
        for i in self._touched:
            self.sites[i].edits = None
            self.sites[i].reads = []
        self._active = []
        self._touched = set()
        self._table_key = None

    def _enter(self, ids: list[str]) -> None:
        """Make `ids` the steered requests of the batch: rows of those that left are released, then new ones taken."""
        for request_id in self._batch.keys() - set(ids):
            self.bank.release(self._requests[request_id].refs)
        self._batch = {i: self._batch[i] if i in self._batch else self._place(self._requests[i]) for i in ids}
        placed = [part for part in self._batch.values() if len(part.first)]
        self._edits = _Edits.concatenate(list(self._batch.values())) if placed else None
        self._clear_table()

    def _place(self, request: _Request) -> _Edits:
        """Bring a request's rows into the bank and number its edits by them."""
        plan = request.plan
        self.bank.acquire(request.refs, lambda ref: self._read(ref, plan.rows))
        edits = plan.edits
        intervals = np.array([e.target.interval(request.prompt_len) for e in edits], dtype=np.int64).reshape(-1, 2)
        read = np.array([-1 if e.read is None else self.bank.slot(e.read) for e in edits], dtype=np.int64)
        response = np.array(
            [(e.response.scale, e.response.shift, e.response.low, e.response.high) for e in edits], dtype=np.float32
        ).reshape(-1, 4)
        source = [-1 if e.read_site is None else self._site_number[e.read_site] for e in edits]
        encoder = [self._encoder_index.get(e.read.sae, -1) if isinstance(e.read, EncoderRow) else -1 for e in edits]
        return _Edits(
            first=intervals[:, 0],
            end=intervals[:, 1],
            site=np.array([self._site_number[e.site] for e in edits], dtype=np.int64),
            owner=np.zeros(len(edits), dtype=np.int64),
            rows=SiteEdits(
                start=np.zeros(len(edits), dtype=np.int64),
                stop=np.zeros(len(edits), dtype=np.int64),
                read=read,
                write=np.array([self.bank.slot(e.write) for e in edits], dtype=np.int64),
                bias=self.bank.bias[read],
                threshold=self.bank.threshold[read],
                scale=response[:, 0],
                shift=response[:, 1],
                low=response[:, 2],
                high=response[:, 3],
                encoder=np.array(encoder, dtype=np.int64),
                feature=np.array([getattr(e.read, "feature", 0) for e in edits], dtype=np.int64),
                norm=np.array([NORMS[e.norm] for e in edits], dtype=np.int64),
                source=np.array(source, dtype=np.int64),
                preserve_norm=np.full(len(edits), plan.preserve_norm),
            ),
        )

    def _read(self, ref: RowRef, inline: dict[str, bytes]) -> Row:
        if isinstance(ref, InlineRow):
            return Row(torch.frombuffer(bytearray(inline[ref.sha256]), dtype=torch.float32))
        rows = self._saes[ref.sae].rows(ref.feature)
        if isinstance(ref, DecoderRow):
            return Row(rows.decoder)
        return Row(rows.encoder, rows.bias, rows.threshold)


def _room(config: SteeringConfig) -> Room:
    """For every forward that vLLM can schedule, so that memory does not grow once vLLM has measured it. Where operators
    allow very many edits a request, or fewer rows than all edits could need, room for the rest is made on need."""
    edits = min(config.max_num_seqs * config.max_edits, config.rows)
    return Room(config.max_num_batched_tokens, config.max_num_seqs, edits, min(config.max_edits, MAX_RANKED))


def _refuse_across_stages(name: str, sae: SAE, elsewhere: frozenset[str]) -> None:
    for read, write in zip(map(str, sae.hook_points), map(str, sae.hook_points_out), strict=True):
        if (read in elsewhere) != (write in elsewhere):
            raise ConfigError(
                f"SAE {name!r} reads at {read} and writes at {write}, which are on different pipeline stages. Leave it "
                "out, or move the boundary between the stages with VLLM_PP_LAYER_PARTITION"
            )


def _encoders(
    saes: dict[str, SAE], sites: Collection[str], device: torch.device
) -> tuple[list[TopKEncoder], dict[str, int]]:
    """The whole encoders of the SAEs at `sites` whose features are compared with each other, which alone need them, and
    their numbers by SHA-256."""
    encoders: list[TopKEncoder] = []
    index: dict[str, int] = {}
    for sha256, sae in saes.items():
        if sae.selection is not None and any(str(point) in sites for point in sae.hook_points):
            index[sha256] = len(encoders)
            encoders.append(encoder_of(sae, device))
    return encoders, index


def encoder_of(sae: SAE, device: torch.device) -> TopKEncoder:
    """The whole encoder of an SAE with a selection, on `device`."""
    selection = sae.selection
    if selection is None:
        raise ValueError(f"SAE {sae.name!r} selects nothing: each feature is decided by its own threshold")
    W_enc, b_enc = sae.encoder()
    router = None
    if selection.routed:
        W, b = sae.router()
        router = W.to(device), b.to(device)
    return TopKEncoder(W_enc.to(device), b_enc.to(device), selection.k, selection.groups, selection.absolute, router)
