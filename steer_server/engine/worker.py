"""Steering inside a worker: which rows act on which tokens of the forward that is about to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from sae_models import SAE
from steer_kernels.apply_edits import (
    MAX_RANKED,
    CapturingSite,
    Gates,
    ReadsForLater,
    Room,
    Site,
    SiteEdits,
    StepTable,
    TableEdits,
    bind_sites,
    compile_for_cpu,
    prepare_edits,
)
from steer_kernels.triton_devices import runs_triton
from steer_server.catalog import open_catalog
from steer_server.engine.batch_edits import BatchEdits
from steer_server.engine.config import ConfigError, SteeringConfig
from steer_server.engine.encoders import Encoders
from steer_server.engine.found_gates import FoundGates, GatedTokens
from steer_server.engine.host_copy import HostCopy
from steer_server.engine.row_bank import Row, RowBank
from steer_server.engine.whole_forwards import (
    Graphs,
    ReplayedForward,
    edited_tokens,
    sites_that_do_not_launch,
)
from steer_server.plan import DecoderRow, EncoderRow, InlineRow, Plan, RowRef


@dataclass(frozen=True)
class StepReport:
    """What one forward did.

    spans: positions [start, end) computed with their edits, by request. missing_sites: sites that had work in this
    forward and did not do it, here or on an earlier pipeline stage. gates: of requests with conditions, (first
    position, OPEN or CLOSED for it and those behind it). replayed: of a forward that a CUDA graph replayed whole, what
    tells of its sites; None where `missing_sites` has all. found: what tells of gates that are not in `gates`.
    """

    spans: dict[str, tuple[int, int]]
    missing_sites: list[str]
    gates: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    replayed: ReplayedForward | None = None
    found: FoundGates | None = None

    def settled(self) -> StepReport:
        """With all missing sites and all gates, whatever runs on the device. Waits for the forward."""
        missing = [] if self.replayed is None else self.replayed.missing_sites()
        gates = self.gates if self.found is None else self.found.said()
        return StepReport(self.spans, [*self.missing_sites, *missing], gates)


@dataclass(frozen=True)
class _Request:
    """for_graphs: whether all of its edits are among those that the launches in a CUDA graph apply."""

    plan: Plan
    prompt_len: int
    refs: frozenset[RowRef]
    for_graphs: bool


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
        self.encoders = Encoders.at(config.sites, self._saes, device)
        self._room = _room(config)
        self.table: StepTable | None = None
        """Where the device runs Triton's kernels: the edits that they apply. CUDA graphs hold it, so it never grows."""
        if runs_triton(device):
            self.table = StepTable(self.bank.rows, len(config.sites), self.encoders.held, self._room)
        elif device.type == "cpu":
            compile_for_cpu(ranks=bool(self.encoders.held))
        self._large_table: StepTable | None = None
        """In its place for the forwards that it has no room for."""
        self.in_graphs = False
        """Whether CUDA graphs of whole forwards were captured with every site's launch in them, and proven."""
        self.graphs_failed = False
        """Whether their capture was tried and did not work."""
        self.replays_whole = False
        """Whether one of them replays the forward at hand."""
        self._graphs: Graphs | None = None
        self._expected: tuple[str, ...] = ()
        self.sites: list[Site] = [Site() for _ in config.sites]
        self._capturing: list[CapturingSite] = []
        self._site_number = {site: i for i, site in enumerate(config.sites)}
        self._requests: dict[str, _Request] = {}
        self._batch: dict[str, BatchEdits] = {}
        self._edits: BatchEdits | None = None
        self._table_key: tuple[bytes, ...] | None = None
        self._active: list[int] = []
        """Sites that edit in the forward at hand."""
        self._gated: GatedTokens | None = None
        """Whose edits depend on conditions in the forward at hand."""
        self._gates: Gates | StepTable | None = None
        """Those conditions: what the torch path reads, or the table that has them."""
        self._offset = np.zeros(0, dtype=np.int64)
        """Of the tokens of each steered request in the batch, from their positions in its sequence."""
        self._touched: set[int] = set()
        """Those, and the sites that they read."""
        self._edited = np.zeros(len(config.sites), dtype=np.int64)
        """Tokens that the table's edits act on in the forward at hand, by site."""
        self._table_is_captured = False
        """Whether the forward's edits are where CUDA graphs look for them, and such as they apply."""
        self._count_before: HostCopy | None = None
        self._spans: dict[str, tuple[int, int]] = {}
        self.missing_before: list[str] = []
        """Sites of earlier pipeline stages that had work in the forward at hand and did not do it."""
        self._report: StepReport | None = None

    @property
    def nbytes(self) -> int:
        """Memory held for steering on the device."""
        table = 0 if self.table is None else self.table.nbytes
        return self.bank.nbytes + table + self.encoders.nbytes

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
        refs = mine.row_refs()
        self._requests[request_id] = _Request(mine, prompt_len, refs, self._for_graphs(mine, refs))

    def expect_step(self, request_ids: Iterable[str]) -> None:
        """The next forward is over tokens of `request_ids`; of none, where no request's."""
        self._expected = tuple(request_ids)
        self.replays_whole = False

    @property
    def graphs(self) -> Graphs:
        """From which CUDA graphs the expected forward may be replayed."""
        if self._graphs is not None:
            return self._graphs
        if self._capturing:
            return Graphs.PIECES
        steered = [self._requests[i] for i in self._expected if i in self._requests]
        if not steered:
            return Graphs.VANILLA
        fit = sum(request.plan.n_rows for request in steered) <= self._room.edits
        fit = fit and all(request.for_graphs for request in steered)
        return Graphs.STEERED if fit and self.in_graphs else Graphs.PIECES

    @contextmanager
    def every_launch(self) -> Iterator[None]:
        """Forwards in here launch the kernel at every site, as CUDA graphs hold it: for any table, this one empty."""
        table = self.table
        assert table is not None
        self._clear_table()
        table.any_launch(self.encoders.rankings)
        sites = [Site() for _ in self.config.sites]
        for i, site in enumerate(sites):
            site.edits = TableEdits(table, i)
        bind_sites(sites)
        self._graphs = Graphs.STEERED
        try:
            yield
        finally:
            self._graphs = None
            bind_sites(())

    def prove(self, replay: Callable[[], object]) -> list[str]:
        """The sites for which a graph that was captured in `every_launch`, and that `replay` replays, has no launch."""
        assert self.table is not None
        self._clear_table()
        self._graphs = Graphs.STEERED
        try:
            wrong = sites_that_do_not_launch(self.table, min(self._room.edits_a_group, self._room.edits), replay)
        finally:
            self._graphs = None
        return [self.config.sites[i] for i in wrong]

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
        self._count_before = None
        if self.replays_whole:
            assert self.table is not None
            if not self._table_is_captured:
                # The graph's launches look at it, and may not find what acted before: what they do not do is missing.
                self.table.clear()
            self._count_before = HostCopy.of(self.table.edited)

    def end_step(self) -> None:
        """Disarm the sites: whatever vLLM runs between steps (warm-up, dummy batches) is not steered."""
        bind_sites(())
        self._report = None
        if not self._spans:
            return
        missing, replayed = list(self.missing_before), None
        if self._count_before is None:
            missing += [self.config.sites[i] for i in self._active if self.sites[i].runs != 1]
        else:
            assert self.table is not None
            after = HostCopy.of(self.table.edited)
            replayed = ReplayedForward(self.config.sites, self._edited, self._count_before, after)
        self._report = StepReport(self._spans, missing, replayed=replayed, found=self._found_gates())

    def _found_gates(self) -> FoundGates | None:
        if self._gated is None:
            return None
        position = self._gated.start - self._offset[self._gated.gate]
        if isinstance(self._gates, Gates):
            return FoundGates.in_torch(self._gates, self._gated, position)
        assert self._gates is not None
        return FoundGates.in_table(self._gates, self._gated, position)

    def take_report(self) -> StepReport | None:
        """What the last forward did, once; None where it held no steered request."""
        report, self._report = self._report, None
        return report

    def _fill(self, start: npt.NDArray[np.int64], count: npt.NDArray[np.int64], token: npt.NDArray[np.int64]) -> None:
        if self._edits is None:
            return
        edits = self._edits
        first, end = edits.acting(start, count)
        acting = first < end
        self._offset = token - start
        offset = self._offset[edits.owner]
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
        condition = rows.is_condition
        if condition.any():
            self._gated = GatedTokens.of(rows.take(condition), list(self._batch))
            self._active = np.unique(site[~condition]).tolist()
        else:
            self._active = np.unique(site).tolist()
        self._touched.update(self._active)
        if self.table is None:
            self._prepare(rows, site)
            return
        # Rows of one site are applied together: those of a request that ranks very many, by whole SAEs.
        ranked = np.zeros((len(self.sites), len(start)), dtype=np.int64)
        np.add.at(ranked, (site, owner), rows.encoder >= 0)
        many = ranked.max(axis=1)[site] > MAX_RANKED
        # A gate and what goes through it are not parted.
        many |= bool((many & (rows.gate >= 0)).any())
        if many.any():
            self._prepare(rows.take(many), site[many])
        if not many.all():
            self._tabulate(rows.take(~many), site[~many], owner[~many])

    def _prepare(self, rows: SiteEdits, site: npt.NDArray[np.int64]) -> None:
        """Give `rows`, sorted by the sites of each, to the torch path."""
        condition = rows.is_condition
        gates = None
        if condition.any():
            self._gates = gates = Gates.of(rows.take(condition), site[condition], self.bank.rows, self.encoders.held)
            for conditions in gates.reads:
                self._read_at(conditions.source, conditions)
            rows, site = rows.take(~condition), site[~condition]
        active, begins = np.unique(site, return_index=True)
        for i, begin, end in zip(active.tolist(), begins, np.append(begins, len(site))[1:], strict=True):
            prepared = prepare_edits(rows.part(begin, end), self.bank.rows, self.encoders.held, gates)
            self.sites[i].edits = prepared
            for reads in prepared.remote:
                self._read_at(reads.source, reads)

    def _read_at(self, site: int, reads: ReadsForLater) -> None:
        self.sites[site].reads.append(reads)
        self._touched.add(site)

    def _tabulate(self, rows: SiteEdits, site: npt.NDArray[np.int64], owner: npt.NDArray[np.int64]) -> None:
        """Give `rows` to the Triton kernel."""
        owners, group = np.unique(owner, return_inverse=True)
        table = self._table_for(Room(int(rows.stop.max()), len(owners), len(rows), int(np.bincount(group).max())))
        table.fill(rows, site, group)
        captured = self.encoders.rankings
        ranked_there = all(set(found) <= set(captured.get(i, ())) for i, found in table.rankings.items())
        self._table_is_captured = table is self.table and ranked_there
        condition = rows.is_condition
        asked_at: set[int] = set()
        waits_for: dict[int, set[int]] = {}
        if condition.any():
            self._gates = table
            asked_at = set(site[condition].tolist())
            waits_for = _sites_that_decide(rows, site, len(self.sites))
            rows, site = rows.take(~condition), site[~condition]
        self._edited = edited_tokens(rows.start, rows.stop, site, len(self.sites))
        written = set(site.tolist())
        at: dict[int, TableEdits] = {}
        # In the order of a forward: what is read for a site is read before it.
        for i in sorted(written | set(rows.source[rows.source >= 0].tolist()) | asked_at):
            sources = set(rows.source[(site == i) & (rows.source >= 0)].tolist())
            sources |= waits_for.get(i, set())
            at[i] = TableEdits(table, i, [at[source] for source in sorted(sources)])
            if i in written:
                self.sites[i].edits = at[i]
            else:
                self._read_at(i, at[i])

    def _table_for(self, needed: Room) -> StepTable:
        assert self.table is not None
        if self._room.holds(needed):
            return self.table
        if self._large_table is None:
            self._large_table = StepTable(self.bank.rows, len(self.sites), self.encoders.held)
        return self._large_table

    def _for_graphs(self, plan: Plan, refs: frozenset[RowRef]) -> bool:
        saes = {ref.sae for ref in refs if isinstance(ref, EncoderRow)}
        return plan.n_rows <= self._room.edits_a_group and not saes & self.encoders.in_groups

    def _clear_table(self) -> None:
        for i in self._touched:
            self.sites[i].edits = None
            self.sites[i].reads = []
        self._active = []
        self._gated = self._gates = None
        self._touched = set()
        self._table_key = None
        self._edited = np.zeros(len(self.sites), dtype=np.int64)
        self._table_is_captured = False

    def _enter(self, ids: list[str]) -> None:
        """Make `ids` the steered requests of the batch: rows of those that left are released, then new ones taken."""
        for request_id in self._batch.keys() - set(ids):
            self.bank.release(self._requests[request_id].refs)
        self._batch = {i: self._batch[i] if i in self._batch else self._place(self._requests[i]) for i in ids}
        placed = [part for part in self._batch.values() if len(part.first)]
        self._edits = BatchEdits.concatenate(list(self._batch.values())) if placed else None
        self._clear_table()

    def _place(self, request: _Request) -> BatchEdits:
        """Bring a request's rows into the bank and number its edits by them."""
        self.bank.acquire(request.refs, lambda ref: self._read(ref, request.plan.rows))
        return BatchEdits.of(request.plan, request.prompt_len, self.bank, self.encoders, self._site_number)

    def _read(self, ref: RowRef, inline: dict[str, bytes]) -> Row:
        if isinstance(ref, InlineRow):
            return Row(torch.frombuffer(bytearray(inline[ref.sha256]), dtype=torch.float32))
        rows = self._saes[ref.sae].rows(ref.feature)
        if isinstance(ref, DecoderRow):
            return Row(rows.decoder)
        return Row(rows.encoder, rows.bias, rows.threshold)


def _sites_that_decide(rows: SiteEdits, site: npt.NDArray[np.int64], n_sites: int) -> dict[int, set[int]]:
    """By the site where edits that go through gates are written, the others at which their conditions are read."""
    reads, writes = np.zeros((2, int(rows.gate.max()) + 1, n_sites), dtype=np.int64)
    condition, gated = rows.is_condition, ~rows.is_condition & (rows.gate >= 0)
    reads[rows.gate[condition], site[condition]] = 1
    writes[rows.gate[gated], site[gated]] = 1
    return {i: set(np.flatnonzero(decides).tolist()) - {i} for i, decides in enumerate(writes.T @ reads)}


def _room(config: SteeringConfig) -> Room:
    """For every forward that vLLM can schedule, so that memory does not grow once vLLM has measured it. Where operators
    allow very many edits a request, or fewer rows than all edits could need, the rest gets a table of its own."""
    edits = min(config.max_num_seqs * config.max_edits, config.rows)
    return Room(config.max_num_batched_tokens, config.max_num_seqs, edits, min(config.max_edits, MAX_RANKED))


def _refuse_across_stages(name: str, sae: SAE, elsewhere: frozenset[str]) -> None:
    for read, write in zip(map(str, sae.hook_points), map(str, sae.hook_points_out), strict=True):
        if (read in elsewhere) != (write in elsewhere):
            raise ConfigError(
                f"SAE {name!r} reads at {read} and writes at {write}, which are on different pipeline stages. Leave it "
                "out, or move the boundary between the stages with VLLM_PP_LAYER_PARTITION"
            )
