"""Fidelity as served: the splice is the reconstruction, the sums are their definitions, and two paths agree or not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_models import load
from steer_kernels.apply_edits import apply_edits
from steer_server.engine.admission import AdmittedSteering
from steer_server.engine.config import ModelFacts, parse_options, resolve_config
from steer_server.engine.worker import WorkerSteering
from steer_server.sae.evaluate import EvalError, check_fit, compare, serving, token_sequences
from steer_server.sae.fidelity import FidelityReport, FidelitySums, Observation, jaccard, kl_divergence
from steer_server.sae.fidelity_plot import save_density_histogram
from steer_server.sae.reference import ReferenceModel, SAELensReference
from steer_server.sae.splice import edits_of_splice, reconstruction, zero_ablation
from tests.sae_models.build import build_sae

ROOT = Path(__file__).parents[2]
CONTEXT = 256

ARCHITECTURES = {
    "standard": dict(architecture="standard"),
    "jumprelu": dict(architecture="jumprelu", cfg={"apply_b_dec_to_input": False}),
    "topk": dict(architecture="topk"),
    "topk-rescaled": dict(architecture="topk", cfg={"rescale_acts_by_decoder_norm": True}),
}


@pytest.fixture(scope="module")
def network(model_dir):
    return ReferenceModel(str(model_dir))


@pytest.fixture(scope="module")
def topk(saes):
    return load(saes["smollm2-135m/l15"])


@pytest.fixture(scope="module")
def jumprelu(saes):
    return replace(load(saes["test/jumprelu"]), skip_first=1)


@pytest.fixture(scope="module")
def engine(model_dir, network, topk, jumprelu):
    with serving([topk, jumprelu], model_dir, network.last_layer, CONTEXT, eager=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def sequences(tokenizer):
    texts = [(ROOT / name).read_text() for name in ("LICENSE", "CONTRIBUTING.md")]
    return token_sequences(texts, tokenizer, 1000, CONTEXT, 1)


def observation(n=60, d_model=6, d_sae=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=generator)
    return Observation(
        x=x,
        xhat=x + 0.3 * torch.randn(n, d_model, generator=generator),
        active=torch.rand(n, d_sae, generator=generator) < 0.4,
        loss_clean=torch.rand(n - 1, generator=generator),
        loss_sae=1 + torch.rand(n - 1, generator=generator),
        loss_zero=5 + torch.rand(n - 1, generator=generator),
        kl_sae=torch.rand(n, generator=generator),
        kl_zero=3 + torch.rand(n, generator=generator),
    )


def fidelity(*observations, skip_first=1):
    sums = FidelitySums(observations[0].x.shape[1], observations[0].active.shape[1])
    for seen in observations:
        sums.add(seen, skip_first)
    return sums.fidelity()


class TestNumbers:
    def test_the_sums_are_the_definitions_over_all_sequences(self):
        sequences = [observation(seed=0), observation(n=40, seed=1)]
        result = fidelity(*sequences, skip_first=2)
        x = torch.cat([s.x[2:] for s in sequences]).double()
        xhat = torch.cat([s.xhat[2:] for s in sequences]).double()
        active = torch.cat([s.active[2:] for s in sequences]).double()
        unexplained = (x - xhat).square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
        assert result.explained_variance == pytest.approx(1 - float(unexplained), abs=1e-12)
        assert result.l0 == pytest.approx(float(active.sum(1).mean()))
        assert np.allclose(result.density, active.mean(0))
        clean, spliced, zeroed = (
            float(torch.cat([getattr(s, f"loss_{name}")[2:] for s in sequences]).double().mean())
            for name in ("clean", "sae", "zero")
        )
        assert result.ce_score == pytest.approx((zeroed - spliced) / (zeroed - clean))
        kl_sae, kl_zero = (
            float(torch.cat([getattr(s, f"kl_{name}")[2:] for s in sequences]).double().mean())
            for name in ("sae", "zero")
        )
        assert result.kl_score == pytest.approx(1 - kl_sae / kl_zero)
        assert (result.tokens, result.sinks) == (96, 0)

    def test_sinks_are_counted_and_left_out(self):
        plain = observation()
        x = plain.x.clone()
        x[20] *= 1000
        with_sink = fidelity(replace(plain, x=x))
        kept = [i for i in range(60) if i != 20]
        assert (with_sink.tokens, with_sink.sinks) == (58, 1)
        fields = {name: getattr(plain, name)[kept] for name in ("x", "xhat", "active")}
        without = fidelity(replace(plain, **fields, kl_sae=plain.kl_sae[kept], kl_zero=plain.kl_zero[kept]))
        assert with_sink.explained_variance == pytest.approx(without.explained_variance)
        assert with_sink.l0 == pytest.approx(without.l0)

    def test_jaccard(self):
        a = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
        b = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
        assert torch.allclose(jaccard(a, b), torch.tensor([1 / 3, 1.0, 0.0], dtype=torch.float64))

    def test_kl_divergence(self):
        p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
        assert float(kl_divergence(p.log(), q.log())) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"ce_sae": 2.0}, "CE score"),
            ({"explained_variance": 0.5}, "explained variance"),
            ({"l0": 1.0}, "L0"),
            ({"explained_variance": float("nan")}, "explained variance"),
        ],
    )
    def test_a_disagreement_is_named(self, change, named, tmp_path):
        numbers = fidelity(observation())
        report = FidelityReport("s", "m", "h", 1, numbers, numbers, jaccard=1.0)
        assert report.agrees
        assert report.as_json()["agrees"] is True
        bad = replace(report, served=replace(numbers, **change))
        assert not bad.agrees
        assert [message for message in bad.disagreements if message.startswith(named)]
        assert replace(report, jaccard=0.98).disagreements == ("active features: Jaccard 0.9800, over 0.99 needed",)
        save_density_histogram(report, tmp_path / "density.png")
        assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens", [5, 70], ids=["beside each other", "as a span"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edit_rows_replace_the_stream_by_the_reconstruction(architecture, tokens, tmp_path):
    """On the op itself, against the SAE's equations on the file as written."""
    sae = replace(load(build_sae(tmp_path / "sae", **ARCHITECTURES[architecture])), skip_first=2)
    options = parse_options({"saes": {"s": str(tmp_path / "sae")}, "max_edits": edits_of_splice(sae)})
    worker = WorkerSteering(
        resolve_config(options, ModelFacts("m", 8, 4, 2, 64, 1)), torch.float32, torch.device("cpu")
    )
    worker.capture(["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"])
    for name, plan in (("sae", reconstruction(sae).plan), ("zero", zero_ablation(sae).plan)):
        worker.add_request(name, plan, tokens)
        hidden, residual = torch.randn(2, tokens + 3, 8)
        stream = hidden + residual
        worker.begin_step([name], np.array([0]), np.array([tokens]))
        for site in range(4):
            apply_edits(hidden, residual, site)
        worker.end_step()
        reference = SAELensReference(tmp_path / "sae")
        wanted = reference.decode(reference.encode(stream.double()), stream)
        wanted = wanted if name == "sae" else torch.zeros_like(wanted)
        wanted[:2], wanted[tokens:] = stream[:2].double(), stream[tokens:].double()
        assert torch.allclose((hidden + residual).double(), wanted, atol=1e-5)
        # Padding behind the tokens is not captured.
        for captured in worker.take_captured():
            assert torch.allclose(captured.double(), wanted[:tokens], atol=1e-5)
        worker.remove_request(name)
    assert worker.has_work
    worker.capture([])
    assert not worker.has_work
    assert worker.take_captured() == []


class TestSequences:
    def test_pieces_follow_each_other_up_to_the_budget(self, tokenizer):
        text = (ROOT / "LICENSE").read_text()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequences = token_sequences(["too short", text], tokenizer, 300, 128, 1)
        assert [len(s) for s in sequences] == [128, 128, 44]
        assert [token for s in sequences for token in s] == ids[:300]

    @pytest.mark.parametrize(("texts", "tokens"), [([], 1000), (["short"], 1000), (["word " * 500], 10)])
    def test_nothing_to_evaluate_on(self, tokenizer, texts, tokens):
        with pytest.raises(EvalError, match="nothing to evaluate on"):
            token_sequences(texts, tokenizer, tokens, 128, 1)


def test_an_sae_of_another_model_is_refused(model_dir, saes, tmp_path):
    shipped = load(saes["smollm2-135m/l15"])
    check_fit(shipped, str(model_dir), CONTEXT)
    with pytest.raises(EvalError, match="is for d_model=8"):
        check_fit(load(build_sae(tmp_path / "narrow")), str(model_dir), CONTEXT)
    deep = load(build_sae(tmp_path / "deep", d_in=576, layer=30))
    with pytest.raises(EvalError, match="layers 0 to 29"):
        check_fit(deep, str(model_dir), CONTEXT)
    with pytest.raises(EvalError, match="context length 100000"):
        check_fit(shipped, str(model_dir), 100_000)


@pytest.mark.engine
class TestServed:
    """One engine with a TopK and a JumpReLU SAE of the same layer."""

    def test_topk_agrees(self, engine, network, topk, sequences):
        report = compare(engine, network, topk, SAELensReference(topk.folder), sequences, "smollm2")
        assert report.agrees, report.disagreements
        assert report.served.tokens == 1000 - len(sequences) - report.served.sinks
        assert report.served.kl_score == pytest.approx(report.reference.kl_score, abs=0.002)
        # What the SAE's card promises, roughly: this is another text.
        assert 0.9 < report.served.ce_score < 1
        assert 0.6 < report.served.explained_variance < 1
        assert report.served.l0 == pytest.approx(32, abs=0.1)
        json.dumps(report.as_json())

    def test_jumprelu_agrees(self, engine, network, jumprelu, sequences):
        report = compare(engine, network, jumprelu, SAELensReference(jumprelu.folder), sequences[:2], "smollm2")
        assert report.agrees, report.disagreements
        assert report.served.l0 > 1

    def test_another_saes_weights_do_not_agree(self, engine, network, topk, jumprelu, sequences):
        report = compare(engine, network, topk, SAELensReference(jumprelu.folder), sequences[:1], "smollm2")
        assert not report.agrees
        assert len(report.disagreements) >= 3

    def test_only_what_was_asked_is_replaced(self, engine, topk, sequences):
        site = str(topk.hook_point)
        clean = engine.run(sequences[0])
        zeroed = engine.run(sequences[0], AdmittedSteering(zero_ablation(topk), None))
        assert torch.equal(zeroed.streams[site][0], clean.streams[site][0])
        # Rounding of hidden + residual, whose parts are far larger than their sum for some dimensions.
        assert zeroed.streams[site][1:].abs().max() < 1e-5 * clean.streams[site].abs().max()
        assert torch.allclose(engine.run(sequences[0]).logprobs, clean.logprobs)
