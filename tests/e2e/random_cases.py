"""Requests for the random Llama: each kind of SAE, vectors at one layer, another and all of them."""

import numpy as np

from tests.e2e import engines
from tests.e2e.cases import active_features
from tests.tensors import inline

D_MODEL, LAYERS, VOCAB = 128, 4, 512
SAE_LAYERS = [0, 0, 1, 1, 2, 2, 3, 1, 3]
"""For `every_kind`: both halves of the model have some, and the Layer Group is in both."""
TOLERANCE = 1e-4
"""Of log-probabilities in fp32."""


def prompt(seed, tokens=24):
    return np.random.default_rng(seed).integers(0, VOCAB, tokens).tolist()


def vector(seed, norm, rows=None):
    values = np.random.default_rng(seed).standard_normal((rows or 1, D_MODEL))
    values *= norm / np.linalg.norm(values, axis=1, keepdims=True)
    return inline(values[0] if rows is None else values)


def random_specs(oracle):
    """Specs by name."""
    made = {
        "first layer": {"vectors": [{"data": vector(1, 6.0), "layers": [0], "strength": 1.0}]},
        "last layer": {"vectors": [{"data": vector(2, 6.0), "layers": [3], "strength": 1.0}]},
        "every layer": {"vectors": [{"data": vector(3, 4.0, LAYERS), "layers": list(range(LAYERS))}]},
        "project_out": {"vectors": [{"data": vector(4, 1.0), "layers": [1, 2], "op": "project_out"}]},
        "generation": {
            "vectors": [{"data": vector(5, 8.0), "layers": [0, 2]}],
            "apply": {"phase": "generation", "preserve_norm": True},
        },
    }
    together = []
    for name in oracle.saes:
        (a, most), (b, _) = active_features(oracle, name, prompt(0, 100), 2)
        entries = [
            {"sae": name, "index": a, "op": "set", "value": round(4 * most, 2)},
            {"sae": name, "index": b, "op": "scale", "value": -2.0},
        ]
        made[name] = {"features": entries}
        together.append(entries[0])
    return made | {"all kinds": {"features": together}} | conditional_specs(oracle)


def conditional_specs(oracle):
    """Of features that are on, often but not always."""

    def when(sae, op, part):
        ((index, most),) = active_features(oracle, sae, prompt(0, 100), 1)
        return {"feature": {"sae": sae, "index": index}, "op": op, "value": round(part * most, 3)}

    everywhere = {"data": vector(3, 4.0, LAYERS), "layers": list(range(LAYERS))}
    ((switched, _),) = active_features(oracle, "kind/switch", prompt(0, 100), 1)
    return {
        "where a feature is on": {
            "vectors": [everywhere],
            "when": [when("kind/layer_norm", ">", 0.0)],
        },
        "between two places": {
            "vectors": [everywhere | {"data": vector(8, 6.0), "layers": [2, 3]}],
            "features": [{"sae": "kind/switch", "index": switched, "op": "set", "value": 5.0}],
            "when": [when("kind/attn_out", "<=", 0.1), when("kind/abstopk", "<", 0.5)],
            "apply": {"preserve_norm": True, "skip_first": 1},
        },
    }


def start(model, saes, **options):
    settings = {"max_model_len": 256, "max_num_seqs": 8, "skip_tokenizer_init": True}
    return engines.start(model, saes, **(settings | options))


def compare_all(llm, oracle, specs, tokens=16):
    """Generate `tokens` with every spec and with none, in one go, and compare with the oracle; the outputs."""
    listed = [(None, prompt(0)), *((spec, prompt(1 + i)) for i, spec in enumerate(specs.values()))]
    asked = [engines.params(spec, max_tokens=tokens, detokenize=False) for spec, _ in listed]
    outputs = engines.generate(llm, [prompt for _, prompt in listed], asked)
    for (spec, _), output in zip(listed, outputs, strict=True):
        assert engines.assert_matches_oracle(oracle, output, spec) < TOLERANCE
        if spec is not None:
            engines.assert_receipt(oracle, output, spec)
    return outputs
