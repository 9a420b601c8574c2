"""Features of the embedded model, of the shipped SAE and of SAEs made from it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import load
from sae_models.features.feature import QUANTILES
from steer_server.sae.explain import ExplainError, explain
from tests.oracle.hf_oracle import Oracle
from tests.sae.texts import SOURCES, TEXTS

SHIPPED = Path(__file__).parents[2] / "sae_models" / "pretrained" / "smollm2-135m-l15"
LAYER, CONTEXT = 15, 40
# Features of the derived SAEs: enough that some fire and few enough that spans are found in seconds.
WIDTH, K = 48, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The shipped SAE, and its first features under each activation function."""
    root = tmp_path_factory.mktemp("saes")
    weights = {name: tensor.float() for name, tensor in load_file(SHIPPED / "sae_weights.safetensors").items()}
    narrow = {
        "W_enc": weights["W_enc"][:, :WIDTH].contiguous(),
        "W_dec": weights["W_dec"][:WIDTH].contiguous(),
        "b_enc": weights["b_enc"][:WIDTH].contiguous(),
        "b_dec": weights["b_dec"],
    }
    config = json.loads((SHIPPED / "cfg.json").read_text()) | {"d_sae": WIDTH, "dtype": "float32"}
    variants = {
        "topk": ({"architecture": "topk", "k": K}, {}),
        "rescaled": (
            {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
            {"W_dec": narrow["W_dec"] * torch.linspace(0.5, 2, WIDTH)[:, None]},
        ),
        "standard": ({"architecture": "standard"}, {}),
        "jumprelu": ({"architecture": "jumprelu"}, {"threshold": torch.linspace(1, 4, WIDTH)}),
    }
    found = {"shipped": SHIPPED}
    for name, (settings, tensors) in variants.items():
        found[name] = root / name
        found[name].mkdir()
        save_file(narrow | tensors, found[name] / "sae_weights.safetensors")
        (found[name] / "cfg.json").write_text(json.dumps(config | settings))
    return found


@pytest.fixture(scope="module")
def oracle(model_dir, folders) -> Oracle:
    return Oracle(model_dir, folders)


@pytest.fixture(scope="module")
def chunks(tokenizer):
    return [
        ids[i : i + CONTEXT]
        for text in TEXTS
        for ids in [tokenizer(text).input_ids]
        for i in range(0, len(ids), CONTEXT)
    ]


@pytest.fixture(scope="module")
def streams(oracle, chunks):
    return [oracle.residual(ids, LAYER) for ids in chunks]


@pytest.fixture(scope="module")
def shipped(model_dir):
    evidence, features = explain(load(SHIPPED), model_dir, TEXTS, SOURCES, context_length=CONTEXT, batch=3, spans=0)
    return evidence, list(features)


@pytest.fixture(scope="module")
def dense(oracle, streams):
    """[tokens, d_sae] of the shipped SAE in fp64, a chunk after the other; zero at the tokens that it skips."""
    acts = [oracle.saes["shipped"].encode(stream) for stream in streams]
    for chunk in acts:
        chunk[0] = 0
    return acts


def test_the_evidence_says_what_was_read(shipped, streams, chunks):
    evidence, features = shipped
    norms = torch.cat([stream[1:] for stream in streams]).double().norm(dim=-1)
    assert evidence.tokens == len(norms) == sum(map(len, chunks)) - len(chunks)
    assert evidence.mean_residual_norm == pytest.approx(float(norms.mean()), rel=1e-4)
    assert (evidence.sae_name, evidence.sae_sha256) == ("smollm2-135m/l15", load(SHIPPED).sha256)
    assert (evidence.model_name, evidence.layer) == ("HuggingFaceTB/SmolLM2-135M-Instruct", LAYER)
    assert (evidence.d_sae, evidence.sources) == (4608, SOURCES)
    assert [feature.index for feature in features] == list(range(4608))


def assert_statistics(features, acts, uncertain):
    """acts, uncertain: [tokens, d_sae], the latter where fp32 may rank otherwise than fp64."""
    for feature in features:
        column, slack = acts[:, feature.index], int(uncertain[:, feature.index].sum())
        active = int((column > 0).sum())
        assert abs(feature.density * len(acts) - active) <= slack + 1e-6
        if not slack:
            assert feature.max_activation == pytest.approx(float(column.max()), rel=1e-3, abs=1e-3)
            if active:
                exact = np.quantile(column[column > 0].numpy(), QUANTILES, method="inverted_cdf")
                assert feature.quantiles == pytest.approx(exact, rel=0.012)
            else:
                assert feature.quantiles == feature.contexts == feature.informative == ()
                assert feature.label == "never active in the evidence"


def near_boundary(pre, k):
    """[tokens, d_sae]: pre-activations so near to the k-th largest, or to zero where that is negative, that rounding
    decides."""
    boundary = pre.topk(k + 1).values[:, k - 1 : k + 1].mean(dim=-1, keepdim=True).clamp(min=0)
    return (pre - boundary).abs() < 2e-3


def test_densities_maxima_and_quantiles_are_those_of_a_dense_fp64_encode(shipped, oracle, streams, dense):
    sae = oracle.saes["shipped"]
    pre = (torch.cat([s[1:] for s in streams]).double() - sae.w["b_dec"]) @ sae.w["W_enc"] + sae.w["b_enc"]
    acts = torch.cat([chunk[1:] for chunk in dense])
    uncertain = near_boundary(pre, sae.config["k"])
    assert uncertain.sum() < 0.02 * (acts > 0).sum()
    assert_statistics(shipped[1], acts, uncertain)
    norms = sae.w["W_dec"].norm(dim=1)
    assert [feature.decoder_norm for feature in shipped[1]] == pytest.approx(norms.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "rescaled", "standard", "jumprelu"])
def test_every_architecture_is_encoded_as_it_is_defined(name, model_dir, folders, oracle, streams):
    sae = oracle.saes[name]
    _, features = explain(load(folders[name]), model_dir, TEXTS, SOURCES, context_length=CONTEXT, spans=0)
    x = torch.cat([stream[1:] for stream in streams])
    pre = (x.double() - sae.w["b_dec"]) @ sae.w["W_enc"] + sae.w["b_enc"]
    if name == "rescaled":
        pre *= sae.w["W_dec"].norm(dim=1)
    uncertain = (pre - sae.w["threshold"]).abs() < 1e-3 if name == "jumprelu" else near_boundary(pre, K)
    features = list(features)
    assert_statistics(features, sae.encode(x), uncertain)
    for feature in features:
        assert feature.decoder_norm == pytest.approx(float(sae.write(feature.index, x[:1]).norm()), rel=1e-5)


def test_contexts_are_the_strongest_of_a_dense_fp64_encode(shipped, dense, chunks, tokenizer):
    checked = strange = 0
    for feature in shipped[1]:
        # One per chunk, and one of those whose window up to the peak is the same text.
        by_text = {}
        for chunk, acts in enumerate(dense):
            position = int(acts[:, feature.index].argmax())
            value = float(acts[position, feature.index])
            if value > 0:
                text = tokenizer.decode(chunks[chunk][max(0, position - 24) : position + 1])
                by_text.setdefault(text, []).append((value, chunk, position))
        expected = sorted((max(found) for found in by_text.values()), reverse=True)
        values = [context.activations[context.peak] for context in feature.contexts]
        if values != pytest.approx([value for value, _, _ in expected], rel=2e-3):
            # Rounding decided whether a token is among the k largest.
            continue
        for context in feature.contexts:
            text = "".join(context.tokens[: context.peak + 1])
            if text not in by_text:
                assert any("\ufffd" in other for other in by_text)
                continue
            places = []
            for _, chunk, position in by_text[text]:
                window = slice(max(0, position - 24), position + 9)
                places.append((tokenizer.decode(chunks[chunk][window]), dense[chunk][window, feature.index]))
            acts = next(acts for whole, acts in places if whole == "".join(context.tokens) or "\ufffd" in whole)
            differs = ~np.isclose(context.activations, acts, rtol=2e-3, atol=1e-2)
            assert not differs[context.peak]
            checked += 1
            strange += differs.any()
    assert checked > 0.9 * sum(len(feature.contexts) for feature in shipped[1]) > 1000
    assert strange < 0.02 * checked


def test_the_tokens_of_contexts_are_the_text_piece_by_piece(shipped, tokenizer):
    pieces = Counter()
    for feature in shipped[1]:
        for context in feature.contexts:
            assert any("".join(context.tokens) in text for text in TEXTS)
            assert len(context.tokens) == len(context.activations) <= 33
            pieces.update(context.tokens)
    assert "\ufffd" not in "".join(pieces)
    # Characters of several tokens stand with the first, and the others are empty.
    assert {" 🌊", "🌊", "", " God", "\n"} <= set(pieces)


def test_informative_tokens_are_those_of_the_contingency_tables(shipped, dense, chunks, tokenizer):
    active = torch.cat([acts[1:] for acts in dense]).numpy() > 0
    ids = np.array([token for chunk in chunks for token in chunk[1:]])
    checked = 0
    for feature in shipped[1]:
        here = active[:, feature.index]
        if here.sum() != round(feature.density * len(ids)):
            continue
        expected = {}
        for token in set(ids[here].tolist()):
            is_token = ids == token
            table = np.array(
                [
                    [(here & is_token).sum(), (here & ~is_token).sum()],
                    [(~here & is_token).sum(), (~here & ~is_token).sum()],
                ]
            ) / len(ids)
            independent = table.sum(axis=1, keepdims=True) * table.sum(axis=0)
            if (here & is_token).sum() >= 3 and table[0, 0] > independent[0, 0]:
                inside = table > 0
                expected[tokenizer.decode([token])] = (table[inside] * np.log2((table / independent)[inside])).sum()
        expected = {token: bits for token, bits in expected.items() if "\ufffd" not in token}
        best = sorted(expected.values(), reverse=True)[:10]
        assert [score.score for score in feature.informative] == pytest.approx(best, rel=1e-3)
        assert [expected[score.token] for score in feature.informative] == pytest.approx(best, rel=1e-3)
        checked += bool(best)
    assert checked > 50


def test_raised_and_lowered_are_those_of_a_direct_product(shipped, oracle, tokenizer):
    weight = oracle.model.model.norm.weight.double()
    unembedding = oracle.model.lm_head.weight.double()
    ordinary = [
        not (i in tokenizer.all_special_ids or i < 17 or "\ufffd" in tokenizer.decode([i]))
        for i in range(len(unembedding))
    ]
    chosen = [0, 740, 4290, 4607]
    logits = (oracle.saes["shipped"].w["W_dec"][chosen] * weight) @ unembedding[ordinary].T
    logits -= logits.mean(dim=1, keepdim=True)
    names = [tokenizer.decode([i]) for i, kept in enumerate(ordinary) if kept]
    for index, row in zip(chosen, logits.detach(), strict=True):
        feature = shipped[1][index]
        for most, scores in ((row.topk(10), feature.raised), (row.topk(10, largest=False), feature.lowered)):
            assert [score.score for score in scores] == pytest.approx(most.values.tolist(), rel=1e-3)
            assert {score.token for score in scores[:9]} <= {names[i] for i in most.indices.tolist()}


def test_labels_are_of_the_feature_s_own_tokens(shipped):
    for feature in shipped[1]:
        assert feature.label_source == "automatic"
        if feature.informative and feature.informative[0].token.strip():
            assert feature.label.startswith(f"tokens: {feature.informative[0].token.strip()}")


def test_a_span_is_the_shortest_text_that_keeps_the_activation(model_dir, folders, oracle, streams, chunks, tokenizer):
    _, features = explain(load(folders["topk"]), model_dir, TEXTS, SOURCES, context_length=CONTEXT, spans=1)
    encode = oracle.saes["topk"].encode
    acts = [encode(stream) for stream in streams]
    for chunk in acts:
        chunk[0] = 0
    found = Counter()
    for feature in list(features)[::3]:
        assert all(context.span is None for context in feature.contexts[1:])
        best = sorted((float(chunk[:, feature.index].max()), i) for i, chunk in enumerate(acts))[::-1]
        if best[0][0] <= 1.001 * best[1][0]:
            continue
        value, chunk = best[0]
        position = int(acts[chunk][:, feature.index].argmax())
        kept = {}
        for length in (1, 2, 4, 8, 16, 32):
            if length <= position:
                ids = [tokenizer.bos_token_id, *chunks[chunk][position + 1 - length : position + 1]]
                kept[length] = float(encode(oracle.residual(ids, LAYER))[-1, feature.index]) / value
                if kept[length] >= 0.8:
                    break
        if any(abs(share - 0.8) < 1e-3 for share in kept.values()):
            continue
        expected = next((length for length, share in kept.items() if share >= 0.8), None)
        context = feature.contexts[0]
        if expected is None:
            assert context.span is None
        else:
            start, stop = context.span
            assert (stop - start, stop) == (expected, context.peak + 1)
            text = tokenizer.decode(chunks[chunk][position + 1 - expected : position + 1])
            assert "".join(context.tokens[start:stop]) == text or "\ufffd" in text
        found[expected] += 1
    assert len(found) >= 4
    assert found[None]


def test_sinks_are_left_out_wherever_they_are(model_dir, folders, tmp_path, streams):
    """Of an SAE that skips nothing, the first token is left out for its norm."""
    norms = torch.cat(streams).norm(dim=-1)
    usual = norms <= 10 * norms.median()
    assert (~usual).sum() == len(streams)
    config = json.loads((folders["topk"] / "cfg.json").read_text())
    del config["metadata"]["steer_server"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(load_file(folders["topk"] / "sae_weights.safetensors"), tmp_path / "sae_weights.safetensors")
    sae = load(tmp_path)
    assert sae.skip_first == 0
    evidence, features = explain(sae, model_dir, TEXTS, SOURCES, context_length=CONTEXT, spans=0)
    assert evidence.tokens == usual.sum()
    assert evidence.mean_residual_norm == pytest.approx(float(norms[usual].mean()), rel=1e-4)
    assert max(feature.max_activation for feature in features) < 10 * norms.median()


def test_texts_that_the_sae_skips_whole_change_nothing(model_dir, folders):
    sae = load(folders["topk"])
    runs = [
        explain(sae, model_dir, texts, SOURCES, context_length=CONTEXT, batch=1, spans=0)
        for texts in (TEXTS[:1], ["a"] * 20 + TEXTS[:1])
    ]
    (evidence, features), (again, features_again) = runs
    assert (evidence, list(features)) == (again, list(features_again))


@pytest.mark.parametrize("texts", [[], ["", "  "[:0]], ["a"]])
def test_text_without_usable_tokens_is_an_error(texts, model_dir):
    with pytest.raises(ExplainError, match="no usable tokens"):
        explain(load(SHIPPED), model_dir, texts, SOURCES)
