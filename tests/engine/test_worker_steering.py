"""Step tables: whatever vLLM schedules, each token gets its own request's edits, as the definition says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models import HookPoint
from steer_kernels.apply_edits import MAX_RANKED, apply_edits
from steer_server.engine.admission import Admission
from steer_server.engine.config import ConfigError, ModelFacts, parse_options, resolve_config
from steer_server.engine.worker import WorkerSteering
from steer_server.plan import CLOSED, OPEN
from tests.e2e.saes import every_kind
from tests.kernels.conftest import INTERPRETED
from tests.oracle.oracle_sae import OracleSAE
from tests.sae_models.build import build_sae
from tests.tensors import inline

D_MODEL, LAYERS = 8, 9


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("saes")
    saes = {name: str(build_sae(root / name, name, seed=i)) for i, name in enumerate(("standard", "jumprelu", "topk"))}
    saes |= {name: str(folder) for name, folder in every_kind(root, D_MODEL, 32, list(range(LAYERS))).items()}
    return resolve_config(parse_options({"saes": saes}), ModelFacts("m", D_MODEL, LAYERS, 3, 64, frontends=1))


class Simulation:
    """A worker's steering beside the streams that its sequences should have, from the definition in float64."""

    def __init__(self, config):
        self.config = config
        self.admission = Admission(config)
        self.worker = WorkerSteering(config, torch.float32, torch.device("cpu"))
        self.saes = {name: OracleSAE(folder) for name, folder in config.saes}
        self.specs = {}
        self.prompt_lens = {}

    def add(self, request_id, spec, prompt_len):
        admitted = self.admission.admit(spec)
        self.worker.add_request(request_id, admitted.plan, prompt_len)
        self.specs[request_id], self.prompt_lens[request_id] = spec, prompt_len

    def step(self, scheduled):
        """Run one forward over `scheduled`, (request id, first position, tokens), and check every site's stream."""
        ids = [i for i, _, _ in scheduled]
        counts = np.array([n for _, _, n in scheduled])
        self.worker.begin_step(ids, np.array([s for _, s, _ in scheduled]), counts)
        incoming = {}
        for number, site in enumerate(self.config.sites):
            hidden, residual = torch.randn(2, int(counts.sum()), D_MODEL)
            incoming[site] = (hidden + residual).double()
            expected, token = incoming[site].clone(), 0
            for request_id, first, n in scheduled:
                for position in range(first, first + n):
                    if request_id in self.specs:
                        streams = {name: stream[token] for name, stream in incoming.items()}
                        expected[token] = self.edited(request_id, site, position, streams)
                    token += 1
            apply_edits(hidden, residual, number)
            assert torch.allclose((hidden + residual).double(), expected, atol=2e-5), site
        self.worker.end_step()
        report = self.worker.take_report()
        self.check_gates(report, scheduled, incoming)
        return report

    def step_of_one_token(self, request_id, first, skipped):
        """Run a forward over ones in which the op does not run at the site `skipped`; the report and the stream."""
        self.worker.begin_step([request_id], np.array([first]), np.array([1]))
        hidden = torch.ones(1, D_MODEL)
        for number, site in enumerate(self.config.sites):
            if site != skipped:
                apply_edits(hidden, None, number)
        self.worker.end_step()
        return self.worker.take_report(), hidden

    def check_gates(self, report, scheduled, incoming):
        """What is reported of conditions, for all tokens from the first to the last that an entry acts on."""
        asked, token = {}, 0
        for request_id, first, n in scheduled:
            spec = self.specs.get(request_id, {})
            entries = [*spec.get("features", []), *spec.get("vectors", [])] if spec.get("when") else []
            acting = [
                position
                for position in range(first, first + n)
                if any(self.acts(e, spec, position, self.prompt_lens[request_id], self.skip(e)) for e in entries)
            ]
            if acting:
                held = [
                    self.holds(spec, {site: stream[token + position - first] for site, stream in incoming.items()})
                    for position in range(acting[0], acting[-1] + 1)
                ]
                asked[request_id] = (acting[0], bytes(OPEN if h else CLOSED for h in held))
            token += n
        assert (report.settled().gates if report else {}) == asked

    def skip(self, entry):
        return self.saes[entry["sae"]].skip_first if "sae" in entry else 0

    def holds(self, spec, streams):
        """Whether all conditions hold of a token with these streams, by site."""
        compare = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}
        return all(
            compare[condition["op"]](self.activation(condition["feature"], streams), float(condition["value"]))
            for condition in spec.get("when", [])
        )

    def activation(self, feature, streams):
        sae = self.saes[feature["sae"]]
        return float(sae.encode(streams[sae.sites[0]].unsqueeze(0))[0, feature["index"]])

    def edited(self, request_id, site, position, streams):
        """The stream that leaves `site`; streams: those that came in there and at the sites before, by site."""
        spec, prompt_len = self.specs[request_id], self.prompt_lens[request_id]
        h = streams[site]
        read_at = [self.saes[c["feature"]["sae"]].sites[0] for c in spec.get("when", [])]
        if not all(read in streams for read in read_at) or not self.holds(spec, streams):
            # What is read behind this site decides about nothing here.
            return h
        delta = torch.zeros_like(h)
        for feature in spec.get("features", []):
            sae = self.saes[feature["sae"]]
            if site in sae.sites_out and self.acts(feature, spec, position, prompt_len, sae.skip_first):
                x = streams[sae.sites[sae.sites_out.index(site)]].unsqueeze(0)
                f = float(sae.encode(x)[0, feature["index"]])
                a = feature.get("value")
                g = {"set": a, "add": f + (a or 0), "min": max(f, a or 0), "max": min(f, a or 0),
                     "scale": f * (a or 0), "ablate": 0.0}[feature["op"]]  # fmt: skip
                delta += (g - f) * sae.write(feature["index"], x)[0]
        for vector in spec.get("vectors", []):
            layers = [f"blocks.{layer}.hook_resid_post" for layer in vector["layers"]]
            if site in layers and self.acts(vector, spec, position, prompt_len):
                v = torch.from_numpy(np.frombuffer(self.bytes_of(vector), dtype=np.float32).copy()).double()
                unit = v / v.norm()
                f = float(h @ unit)
                if vector["op"] == "add":
                    delta += vector["strength"] * v
                elif vector["op"] == "project_out":
                    delta -= f * unit
                else:
                    delta += (min(max(f, vector["min"]), vector["max"]) - f) * unit
        edited = h + delta
        if spec.get("apply", {}).get("preserve_norm") and not torch.equal(edited, h):
            edited = edited * h.norm() / edited.norm()
        return edited

    @staticmethod
    def bytes_of(vector):
        import base64

        return base64.b64decode(vector["data"]["data"])

    @staticmethod
    def acts(entry, spec, position, prompt_len, sae_skip=0):
        apply = spec.get("apply", {}) | entry.get("apply", {})
        in_phase = {"prompt": position < prompt_len, "generation": position >= prompt_len, "all": True}
        return in_phase[apply.get("phase", "all")] and position >= apply.get("skip_first", sae_skip)


def feature(sae, index, op, value=None, **rest):
    return {"sae": sae, "index": index, "op": op} | ({} if value is None else {"value": value}) | rest


VECTOR = inline(np.linspace(-1, 2, D_MODEL))
SPECS = {
    "features": {
        "features": [
            feature("standard", 1, "set", 3.0),
            feature("jumprelu", 2, "min", 1.5),
            feature("topk", 3, "scale", -2.0),
            feature("topk", 4, "ablate"),
            feature("standard", 5, "max", 0.1, apply={"phase": "prompt"}),
            feature("jumprelu", 6, "add", -0.7, apply={"skip_first": 4}),
        ]
    },
    "vectors": {
        "vectors": [
            {"data": VECTOR, "layers": [0, 1, 2, 3], "op": "add", "strength": 0.5},
            {"data": VECTOR, "layers": [2], "op": "cap", "min": -0.2, "max": 0.2, "apply": {"phase": "generation"}},
        ],
        "apply": {"preserve_norm": True},
    },
    "every kind": {
        "features": [
            feature("kind/resid_pre", 0, "set", 2.0),
            feature("kind/attn_out", 1, "scale", -1.0),
            feature("kind/mlp_out", 2, "scale", 3.0),
            feature("kind/mlp_in", 3, "ablate"),
            feature("kind/layer_norm", 4, "scale", 2.0),
            feature("kind/layer_norm", 5, "add", 1.5),
            feature("kind/constant_norm", 6, "max", 0.2),
            feature("kind/constant_norm", 7, "add", -1.0, apply={"phase": "generation"}),
            *[feature("kind/abstopk", i, "scale", -1.0) for i in range(6)],
            *[feature("kind/groupmax", i, "scale", 2.0) for i in range(6)],
        ],
    },
    "several features of a kind": {
        "features": [
            *[feature("kind/switch", i, "scale", 2.0) for i in range(0, 32, 3)],
            *[feature("kind/transcoder", i, "set", 0.5 * i) for i in range(3)],
            feature("kind/transcoder", 5, "add", 2.0),
            *[feature("kind/topk_transcoder", i, "scale", -1.0) for i in range(0, 16, 2)],
            feature("kind/topk_transcoder", 31, "add", 0.5),
            feature("kind/layer_group", 3, "scale", 0.5),
        ],
        "apply": {"preserve_norm": True, "skip_first": 0},
    },
    "conditions": {
        "features": [
            feature("kind/transcoder", 1, "set", 2.0, apply={"phase": "generation"}),
            feature("kind/abstopk", 3, "scale", -1.0),
            feature("kind/switch", 4, "add", 1.0),
        ],
        "vectors": [{"data": VECTOR, "layers": [3, 4, 8], "op": "add", "strength": 0.5}],
        "when": [
            {"feature": {"sae": "standard", "index": 1}, "op": ">", "value": 0.2},
            {"feature": {"sae": "kind/abstopk", "index": 3}, "op": "<=", "value": 0.5},
        ],
    },
    "a condition on what TopK keeps": {
        "features": [feature("standard", 5, "set", 1.0), feature("topk", 2, "scale", 3.0)],
        "vectors": [{"data": VECTOR, "layers": [1, 6], "op": "cap", "min": -0.2, "max": 0.2}],
        "when": [{"feature": {"sae": "topk", "index": 3}, "op": "<", "value": 0.1, "scope": "token"}],
        "apply": {"preserve_norm": True, "skip_first": 2},
    },
    "conditions through token norms": {
        "vectors": [{"data": VECTOR, "layers": [2, 7], "op": "add", "strength": 1.0}],
        "when": [
            {"feature": {"sae": "kind/layer_norm", "index": 4}, "op": "<=", "value": 0.0},
            {"feature": {"sae": "kind/constant_norm", "index": 6}, "op": ">", "value": 0.0},
        ],
    },
    "a condition at the first place": {
        "vectors": [{"data": VECTOR, "layers": [0, 1], "op": "add", "strength": 1.0}],
        "when": [
            {"feature": {"sae": "kind/resid_pre", "index": 0}, "op": ">=", "value": 0.1},
            {"feature": {"sae": "kind/resid_pre", "index": 0}, "op": "<", "value": 2.5},
        ],
        "apply": {"phase": "prompt"},
    },
    "generation": {"vectors": [{"data": VECTOR, "layers": [1], "op": "project_out"}], "apply": {"phase": "generation"}},
}


def test_a_life_of_three_requests_and_a_bystander(config):
    """Prefill in chunks, decode, batches that change order, preemption and resumption, finish."""
    torch.manual_seed(0)
    sim = Simulation(config)
    sim.add("a", SPECS["features"], prompt_len=21)
    sim.add("b", SPECS["vectors"], prompt_len=9)
    assert sim.step([("a", 0, 16)]).spans == {"a": (0, 16)}
    assert sim.step([("a", 16, 5), ("x", 0, 30), ("b", 0, 9)]).spans == {"a": (16, 21), "b": (0, 9)}
    sim.add("c", SPECS["generation"], prompt_len=12)
    sim.step([("a", 21, 1), ("x", 30, 1), ("b", 9, 1), ("c", 0, 12)])
    for i in range(3):
        report = sim.step([("a", 22 + i, 1), ("x", 31 + i, 1), ("b", 10 + i, 1), ("c", 12 + i, 1)])
        assert report.missing_sites == []
    sim.step([("c", 15, 1), ("a", 25, 1)])
    assert sim.step([("x", 34, 1)]) is None
    sim.step([("b", 0, 13), ("c", 16, 1), ("a", 26, 1)])
    for request_id in ("a", "b", "c"):
        sim.worker.remove_request(request_id)
        del sim.specs[request_id]
    assert len(sim.worker.bank) == 0
    assert not sim.worker.has_work
    assert sim.step([("x", 35, 1)]) is None


def test_a_forward_in_which_no_edit_acts(config):
    """The prompt of a request that is steered in generation only, alone in its batch."""
    sim = Simulation(config)
    sim.add("c", SPECS["generation"], prompt_len=5)
    report = sim.step([("c", 0, 3)])
    assert report.spans == {"c": (0, 3)}
    assert report.missing_sites == []
    sim.step([("c", 3, 2)])
    sim.step([("c", 5, 1)])


# A step names who is in the batch, in what order, and how many tokens each gets; a request may be preempted first.
STEPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "x"]), st.integers(1, 7), st.sampled_from([False] * 4 + [True])),
        min_size=1,
        max_size=4,
        unique_by=lambda entry: entry[0],
    ),
    min_size=1,
    max_size=8,
)


@given(
    steps=STEPS,
    specs=st.lists(st.sampled_from([*SPECS, "empty"]), min_size=3, max_size=3),
    lens=st.tuples(*[st.integers(1, 12)] * 3),
)
@settings(max_examples=5 if INTERPRETED else 60, derandomize=INTERPRETED)
def test_whatever_is_scheduled(config, steps, specs, lens):
    sim = Simulation(config)
    for request_id, spec, prompt_len in zip("abc", specs, lens, strict=True):
        sim.add(request_id, SPECS.get(spec, {}), prompt_len)
    computed = dict.fromkeys("abcx", 0)
    for batch in steps:
        scheduled = []
        for request_id, tokens, preempted in batch:
            first = 0 if preempted else computed[request_id]
            scheduled.append((request_id, first, tokens))
            computed[request_id] = first + tokens
        # And a token of each, twice: the second time the table may be the first one's.
        again = [[(i, computed[i] + n, 1) for i, _, _ in scheduled] for n in (0, 1)]
        computed |= {i: computed[i] + 2 for i, _, _ in scheduled}
        for forward in (scheduled, *again):
            report = sim.step(forward)
            steered = {i: (first, first + tokens) for i, first, tokens in forward if i != "x"}
            assert (report.spans if report else {}) == steered
            assert report is None or report.missing_sites == []
    for request_id in "abc":
        sim.worker.remove_request(request_id)
    assert len(sim.worker.bank) == 0


def test_rows_of_a_request_that_is_not_in_the_batch_make_room(config):
    """The bank holds what one batch can use: preempted requests must not keep their rows."""
    sim = Simulation(config)
    for i in range(9):
        sim.add(f"r{i}", {"features": [feature("standard", j, "set", 1.0) for j in range(i, i + 10)]}, prompt_len=4)
    for i in range(0, 9, 3):
        sim.step([(f"r{i + j}", 0, 4) for j in range(3)])
        assert len(sim.worker.bank) == 2 * 12


def test_a_site_that_does_not_run_is_reported(config):
    sim = Simulation(config)
    sim.add("a", SPECS["vectors"], prompt_len=3)
    sim.worker.begin_step(["a"], np.array([0]), np.array([3]))
    hidden = torch.zeros(3, D_MODEL)
    skipped = "blocks.2.hook_resid_post"
    for number, site in enumerate(config.sites):
        if site != skipped:
            apply_edits(hidden, None, number)
    sim.worker.end_step()
    assert sim.worker.take_report().missing_sites == [skipped]


@pytest.mark.parametrize("skipped", ["blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"])
def test_a_transcoder_whose_input_was_not_read_is_reported_and_writes_nothing(config, skipped):
    sim = Simulation(config)
    sim.add("a", {"features": [feature("kind/transcoder", 1, "set", 3.0)], "apply": {"skip_first": 0}}, prompt_len=2)
    for first in (0, 1):
        # The second time the table is the first one's, and nothing of that forward may be left.
        report, hidden = sim.step_of_one_token("a", first, skipped)
        assert report.missing_sites == ["blocks.5.hook_mlp_out"]
        assert torch.equal(hidden, torch.ones(1, D_MODEL))


@pytest.mark.parametrize("skipped", ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"])
def test_a_condition_that_was_not_read_is_reported_and_decides_nothing(config, skipped):
    sim = Simulation(config)
    sim.add("a", SPECS["conditions"] | {"apply": {"skip_first": 0}}, prompt_len=2)
    for first in (0, 1):
        report, hidden = sim.step_of_one_token("a", first, skipped)
        written = {"blocks.3.hook_resid_post", "blocks.4.hook_resid_post", "blocks.5.hook_resid_post"}
        assert set(report.missing_sites) == written | {"blocks.8.hook_resid_post"}
        assert torch.equal(hidden, torch.ones(1, D_MODEL))


def test_a_gate_and_what_goes_through_it_are_not_parted(config):
    """Though a request that ranks more features than are ranked one by one is edited by whole SAEs."""
    many = [{"feature": {"sae": "topk", "index": i % 24}, "op": ">", "value": -1.0 - i} for i in range(MAX_RANKED + 1)]
    sim = Simulation(replace(config, max_edits=MAX_RANKED + 4))
    sim.add("a", {"vectors": SPECS["conditions"]["vectors"], "when": many}, prompt_len=3)
    sim.add("b", SPECS["conditions"], prompt_len=4)
    sim.step([("a", 0, 3), ("b", 0, 4)])
    sim.step([("b", 4, 1), ("a", 3, 1)])


def test_nothing_is_steered_between_steps(config):
    sim = Simulation(config)
    sim.add("a", SPECS["vectors"], prompt_len=3)
    sim.step([("a", 0, 3)])
    hidden = torch.zeros(3, D_MODEL)
    apply_edits(hidden, None, 0)
    assert torch.equal(hidden, torch.zeros(3, D_MODEL))


def test_an_empty_plan_is_no_edit(config):
    sim = Simulation(config)
    sim.add("a", {}, prompt_len=3)
    assert sim.step([("a", 0, 3)]).spans == {"a": (0, 3)}


def test_decoding_reuses_its_table(config):
    sim = Simulation(config)
    sim.add("a", SPECS["features"], prompt_len=4)
    sim.step([("a", 0, 4)])
    sim.step([("a", 4, 1)])
    site = config.sites.index("blocks.1.hook_resid_post")
    table = sim.worker.sites[site].edits
    assert table is not None
    sim.step([("a", 5, 1)])
    assert sim.worker.sites[site].edits is table


def test_device_memory_is_accounted_for(config):
    worker = WorkerSteering(config, torch.float32, torch.device("cpu"))
    topk_encoder, others = D_MODEL * 24 + 24, 5 * (D_MODEL * 32 + 32)
    router = D_MODEL * 4 + 4
    table = 0 if worker.table is None else worker.table.nbytes
    assert worker.nbytes == 4 * (config.rows * D_MODEL + topk_encoder + others + router) + table


def test_encoders_are_held_as_their_kernels_read_them(config):
    worker = WorkerSteering(config, torch.float32, torch.device("cpu"))
    assert all(encoder.W_enc.T.is_contiguous() for encoder in worker.encoders.held)


def test_any_armed_site_can_be_captured(config):
    worker = WorkerSteering(config, torch.float32, torch.device("cpu"))
    wanted = ["blocks.1.hook_attn_out", "blocks.5.mlp.hook_in", "blocks.8.hook_resid_post"]
    worker.capture(wanted)
    streams = torch.randn(len(config.sites), 4, D_MODEL)
    worker.begin_step(["x"], np.array([0]), np.array([3]))
    for site, stream in enumerate(streams):
        apply_edits(stream, None, site)
    worker.end_step()
    # The fourth row is padding.
    for site, captured in zip(wanted, worker.take_captured(), strict=True):
        assert torch.equal(captured, streams[config.sites.index(site)][:3])
    with pytest.raises(ValueError, match=r"blocks\.3\.hook_attn_out cannot be captured; armed: blocks\.0"):
        worker.capture(["blocks.3.hook_attn_out"])


def stage_of(config, layers):
    """The worker of the pipeline stage that holds `layers`."""
    here = tuple(site for site in config.sites if HookPoint.parse(site).layer in layers)
    elsewhere = frozenset(config.sites) - frozenset(here)
    return WorkerSteering(replace(config, sites=here), torch.float32, torch.device("cpu"), elsewhere)


@pytest.mark.parametrize("spec", [name for name, spec in SPECS.items() if "when" not in spec])
def test_pipeline_stages_do_together_what_one_worker_does(config, spec):
    """Each with the rows and encoders of its own sites only."""
    plan = Admission(config).admit(SPECS[spec]).plan
    whole = stage_of(config, range(LAYERS))
    streams = torch.randn(len(config.sites), 6, D_MODEL)
    edited = dict(zip(config.sites, streams, strict=True))
    expected = {site: stream.clone() for site, stream in edited.items()}
    stages = [stage_of(config, range(5)), stage_of(config, range(5, LAYERS))]
    for worker, held in ((whole, expected), *((stage, edited) for stage in stages)):
        worker.add_request("a", plan, prompt_len=3)
        worker.begin_step(["a"], np.array([0]), np.array([6]))
        for number, site in enumerate(worker.config.sites):
            apply_edits(held[site], None, number)
        worker.end_step()
        report = worker.take_report()
        assert (report.spans, report.missing_sites) == ({"a": (0, 6)}, [])
    assert all(torch.equal(edited[site], expected[site]) for site in config.sites)
    assert max(len(stage.bank) for stage in stages) <= len(whole.bank) <= sum(len(stage.bank) for stage in stages)
    assert sum(len(stage.encoders.held) for stage in stages) == len(whole.encoders.held)
    assert all(len(stage.encoders.held) < len(whole.encoders.held) for stage in stages)


def test_what_an_earlier_stage_missed_is_in_the_last_ones_report(config):
    stage = stage_of(config, range(5, LAYERS))
    stage.add_request("a", Admission(config).admit(SPECS["vectors"]).plan, prompt_len=3)
    stage.missing_before = ["blocks.2.hook_resid_post"]
    stage.begin_step(["a"], np.array([0]), np.array([3]))
    stage.end_step()
    assert stage.take_report().missing_sites == ["blocks.2.hook_resid_post"]


def test_an_sae_that_reads_on_one_stage_and_writes_on_another_is_refused(config):
    elsewhere = frozenset({"blocks.5.hook_mlp_out"})
    with pytest.raises(ConfigError, match=r"'kind/transcoder' reads at blocks.5.mlp.hook_in and writes .*PARTITION"):
        WorkerSteering(config, torch.float32, torch.device("cpu"), elsewhere)
