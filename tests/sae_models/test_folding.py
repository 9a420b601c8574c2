"""Folding: rows on the model's own activations do what the pipeline does that the SAE was trained in, in float64.

The pipeline is written out here, step by step: token norm, normalisation of the data set or whitening, b_dec taken off,
encoder, activation function, decoder, and all of it back.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_models.architectures import ENCODERS
from sae_models.folding import IDENTITY, AffineMap, scaled, whitening
from tests.sae_models.architecture_cases import CASES, D_SAE, Draw
from tests.sae_models.in_memory import decode, encode, sae_of

D_IN = 7
TOLERANCE = 1e-9
PER_TOKEN = ("none", "layer_norm", "constant_norm")
PER_DATA_SET = ("none", "scaled", "whitened")


def close(ours, theirs):
    size = theirs.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    return float(((ours - theirs).abs() / size).max()) <= TOLERANCE


def token_normalised(x, norm):
    """(x in the units of training, how a reconstruction is brought back)."""
    if norm == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if norm == "constant_norm":
        factor = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
        return x * factor, lambda y: y / factor
    return x, lambda y: y


def data_set_normalised(draw, kind):
    """(the maps for our SAE, the same as functions)."""
    if kind == "scaled":
        factor = float(draw(1).abs() + 0.1)
        return (scaled(factor), scaled(1 / factor)), (lambda x: x * factor, lambda y: y / factor)
    if kind == "whitened":
        mean = draw(D_IN)
        matrix = torch.linalg.qr(draw(D_IN, D_IN)).Q * (draw(D_IN).abs() + 0.5)
        inverse = torch.linalg.inv(matrix)
        return whitening(mean, matrix, inverse), (lambda x: (x - mean) @ matrix, lambda y: y @ inverse + mean)
    return (IDENTITY, IDENTITY), (lambda x: x, lambda y: y)


@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(set(ENCODERS) - {"switch"})),
    st.sampled_from(PER_TOKEN),
    st.sampled_from(PER_DATA_SET),
    st.booleans(),
)
def test_fold_then_encode_is_the_pipeline(seed, architecture, per_token, per_data_set, subtracts_b_dec):
    draw = Draw(seed, grid=False)
    case = CASES[architecture](draw)
    W_enc, W_dec, b_dec = draw(D_IN, D_SAE), draw(D_SAE, D_IN), draw(D_IN)
    x = draw(draw.n, D_IN) * 3 + draw(D_IN)
    (into, out_of), (normalise, denormalise) = data_set_normalised(draw, per_data_set)

    in_training_units, back = token_normalised(x, per_token)
    z = normalise(in_training_units) - (b_dec if subtracts_b_dec else 0.0)
    defined = ENCODERS[architecture].activations(z @ W_enc, **case.defining)
    reconstruction = back(denormalise(defined @ W_dec + b_dec))

    activation = ENCODERS[architecture].canonical(**case.canonical)
    input_map = into.then_subtract(b_dec) if subtracts_b_dec else into
    sae = sae_of(W_enc, W_dec, b_dec, activation, input_map, out_of, per_token)
    ours = encode(sae, x)
    assert torch.equal(ours != 0, defined != 0)
    assert close(ours, defined)
    assert close(decode(sae, ours, x), reconstruction)


@given(st.integers(0, 2**31), st.sampled_from(PER_TOKEN), st.sampled_from(PER_DATA_SET))
def test_one_feature_has_the_rows_of_the_whole(seed, per_token, per_data_set):
    draw = Draw(seed, grid=False)
    (into, out_of), _ = data_set_normalised(draw, per_data_set)
    case = CASES["gated"](draw)
    W_enc, W_dec, b_dec = draw(D_IN, D_SAE), draw(D_SAE, D_IN), draw(D_IN)
    activation = ENCODERS["gated"].canonical(**case.canonical)
    sae = sae_of(W_enc, W_dec, b_dec, activation, into.then_subtract(b_dec), out_of, per_token)
    (_, encoder, bias, decoder) = next(iter(sae.blocks()))
    for feature in range(D_SAE):
        rows = sae.rows(feature)
        assert torch.equal(rows.encoder, encoder[feature].float())
        assert torch.equal(rows.decoder, decoder[feature].float())
        assert (rows.bias, rows.threshold) == (float(bias[feature]), float(activation.threshold[feature]))


@given(st.integers(0, 2**31), st.sampled_from(PER_DATA_SET))
def test_an_edit_changes_the_reconstruction_by_its_decoder_row(seed, per_data_set):
    """What makes two rows enough to steer a feature."""
    draw = Draw(seed, grid=False)
    (into, out_of), _ = data_set_normalised(draw, per_data_set)
    activation = ENCODERS["relu"].canonical(draw(D_SAE))
    sae = sae_of(draw(D_IN, D_SAE), draw(D_SAE, D_IN), draw(D_IN), activation, into, out_of)
    x = draw(draw.n, D_IN)
    acts = encode(sae, x)
    feature = draw.among(*range(D_SAE))
    edited = acts.clone()
    edited[:, feature] = 5.0
    decoder = next(iter(sae.blocks()))[3]
    difference = (5.0 - acts[:, feature : feature + 1]) * decoder[feature]
    assert close(decode(sae, edited, x), decode(sae, acts, x) + difference)


@given(st.integers(0, 2**31))
def test_maps(seed):
    draw = Draw(seed, grid=False)
    v, w = draw(draw.n, D_IN), draw(5, D_IN)
    (into, out_of), (forth, back) = data_set_normalised(draw, "whitened")
    assert close(into.apply(v), forth(v))
    assert close(out_of.apply(into.apply(v)), v)
    assert close(back(forth(v)), v)
    for map_ in (into, scaled(0.3), IDENTITY, AffineMap(0.5, draw(D_IN)), into.then_subtract(draw(D_IN))):
        # What reads `apply(v)` along w reads v along the folded row, plus an offset.
        assert close(map_.apply(v) @ w.T, v @ map_.transposed(w).T + map_.offset(w))
