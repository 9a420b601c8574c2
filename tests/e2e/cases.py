"""Requests that between them use every op, target and option, and what is expected of each."""

import numpy as np
import torch

from tests.tensors import inline

PROMPTS = [
    "The history of the printing press begins with",
    "My favourite recipe for tomato soup is simple. First,",
    "Once upon a time, in a village by the sea, there lived",
    "Dear hiring manager, I am writing to apply for",
    "The three laws of thermodynamics state that",
    "In Python, a dictionary is a data structure that",
    "The doctor looked at the patient and said",
    "Here are some tips for a better night's sleep:",
]
D_MODEL = 576


def long_prompt(oracle_tokenizer, tokens, start=0):
    """Token ids of a text of exactly `tokens` tokens."""
    text = " ".join(PROMPTS[(start + i) % len(PROMPTS)] for i in range(tokens))
    return oracle_tokenizer(text)["input_ids"][:tokens]


def direction(seed, scale=1.0, rows=None):
    """A reproducible vector, or matrix of `rows`, whose rows have norm `scale`."""
    values = np.random.default_rng(seed).standard_normal((rows or 1, D_MODEL))
    values *= scale / np.linalg.norm(values, axis=1, keepdims=True)
    return values[0] if rows is None else values


def prompt_of(i):
    """The prompt that the i-th spec, in the order of `all_specs`, is tried on."""
    return PROMPTS[i % len(PROMPTS)]


def active_features(oracle, sae, tokens, count):
    """(index, largest activation) of features that are on, often but not always, on these tokens: edits of those are
    conditional."""
    acts = oracle.saes[sae].encode(oracle.stream(tokens, oracle.saes[sae].sites[0]))[1:]
    rate = (acts > 0).double().mean(0)
    score = torch.where((rate > 0.05) & (rate < 0.95), acts.mean(0), -1.0)
    return [(index, float(acts[:, index].max())) for index in score.topk(count).indices.tolist()]


def feature_specs(oracle, sae, prompts):
    """One spec for each feature op, on a feature that is active in its own prompt."""
    values = {"set": 2.0, "add": 1.5, "min": 3.0, "max": 0.1, "scale": -1.5, "ablate": None}
    specs = {}
    for (op, value), tokens in zip(values.items(), prompts, strict=True):
        ((index, largest),) = active_features(oracle, sae, tokens, 1)
        entry = {"sae": sae, "index": index, "op": op}
        if value is not None:
            entry["value"] = round(value if op == "scale" else value * largest, 2)
        specs[f"{sae} {op}"] = {"features": [entry]}
    return specs


def kind_specs(oracle, tokenizer):
    """One spec for each SAE at another place or of another kind, several of its features at once; and all together."""
    tokens = tokenizer(" ".join(PROMPTS))["input_ids"]
    specs, together = {}, []
    for name in (name for name in oracle.saes if name.startswith("kind/")):
        (a, most), (b, _), (c, _), (d, least) = active_features(oracle, name, tokens, 4)
        # What an MLP writes is large beside what its normalised input lets a random transcoder write.
        size = 40.0 if "transcoder" in name else 2.0
        entries = [
            {"sae": name, "index": a, "op": "set", "value": round(size * most, 2)},
            {"sae": name, "index": b, "op": "scale", "value": -size},
            {"sae": name, "index": c, "op": "ablate"},
            {"sae": name, "index": d, "op": "add", "value": round(size * least, 2)},
        ]
        specs[name] = {"features": entries}
        together.append(entries[1])
    vector = {"data": inline(direction(6, 8.0)), "layers": [7, 21], "strength": 1.0}
    specs["all kinds together"] = {"features": together, "vectors": [vector], "apply": {"preserve_norm": True}}
    return specs


def all_specs(oracle, tokenizer):
    """Specs by name; together they cover features, vectors, targets, several entries at once and preserve_norm."""
    specs = {}
    for sae in (name for name in oracle.saes if not name.startswith("kind/")):
        prompts = [tokenizer(prompt_of(len(specs) + i))["input_ids"] for i in range(6)]
        specs |= feature_specs(oracle, sae, prompts)
    tokens = tokenizer(" ".join(PROMPTS))["input_ids"]
    # A direction in which these texts differ: without it the model still makes sense.
    stream = oracle.residual(tokens, 12)[1:]
    contrast = (stream[: len(stream) // 2].mean(0) - stream[len(stream) // 2 :].mean(0)).numpy()
    some = active_features(oracle, "smollm2-135m/l15", tokens, 8)
    add = {"data": inline(direction(1, 8.0)), "layers": [12], "op": "add", "strength": 2.0}
    specs |= {
        "add": {"vectors": [add]},
        "add f16, negative": {"vectors": [add | {"data": inline(direction(2, 8.0), "float16"), "strength": -1.5}]},
        "add bf16 everywhere": {
            "vectors": [add | {"data": inline(direction(3, 1.0), "bfloat16"), "layers": list(range(30))}]
        },
        "add, a row for each layer": {"vectors": [add | {"data": inline(direction(4, 6.0, 3)), "layers": [5, 14, 25]}]},
        "project_out": {"vectors": [{"data": inline(contrast), "layers": [12, 13], "op": "project_out"}]},
        "scale_along": {"vectors": [{"data": inline(contrast), "layers": [12], "op": "scale_along", "strength": 1.8}]},
        "cap": {"vectors": [{"data": inline(contrast), "layers": [12, 20], "op": "cap", "min": -3.0, "max": 3.0}]},
        "prompt only": {"vectors": [add], "apply": {"phase": "prompt"}},
        "generation only": {"vectors": [add | {"strength": 4.0}], "apply": {"phase": "generation"}},
        "skip_first": {"vectors": [add | {"strength": 4.0}], "apply": {"skip_first": 5}},
        "preserve_norm": {"vectors": [add | {"strength": 6.0}], "apply": {"preserve_norm": True}},
        "eight features and a vector": {
            "features": [{"sae": "smollm2-135m/l15", "index": i, "op": "scale", "value": 0.3} for i, _ in some],
            "vectors": [add | {"layers": [15], "apply": {"phase": "generation"}}],
            "apply": {"skip_first": 2},
        },
        "one feature, another in each phase": {
            "features": [
                {
                    "sae": "test/jumprelu",
                    "index": some[0][0],
                    "op": "set",
                    "value": some[0][1],
                    "apply": {"phase": "prompt"},
                },
                {"sae": "test/jumprelu", "index": some[0][0], "op": "ablate", "apply": {"phase": "generation"}},
            ]
        },
    }
    return specs | kind_specs(oracle, tokenizer) | conditional_specs(oracle, tokenizer)


def half_on(oracle, sae, tokens):
    """(index, largest activation) of the feature that is on in nearest to half of these tokens."""
    acts = oracle.saes[sae].encode(oracle.stream(tokens, oracle.saes[sae].sites[0]))[1:]
    index = int(((acts > 0).double().mean(0) - 0.5).abs().argmin())
    return index, float(acts[:, index].max())


def conditional_specs(oracle, tokenizer):
    """Conditions on a TopK SAE's feature, on one of an earlier layer, and on two."""
    tokens = tokenizer(" ".join(PROMPTS))["input_ids"]

    def when(sae, op, part):
        index, most = half_on(oracle, sae, tokens)
        return {"feature": {"sae": sae, "index": index}, "op": op, "value": round(part * most, 3)}

    (shipped, _), (other, most) = active_features(oracle, "smollm2-135m/l15", tokens, 2)
    push = {"data": inline(direction(11, 8.0)), "layers": [16, 20], "strength": 3.0}
    return {
        "where a feature of the same SAE is on": {
            "features": [{"sae": "smollm2-135m/l15", "index": other, "op": "set", "value": round(2 * most, 2)}],
            "vectors": [push],
            "when": [when("smollm2-135m/l15", ">", 0.0)],
        },
        "where a feature of an earlier layer is off": {
            "vectors": [push | {"layers": list(range(9, 30)), "strength": 0.5}],
            "when": [when("test/relu", "<=", 0.0)],
            "apply": {"phase": "generation"},
        },
        "two conditions": {
            "features": [{"sae": "smollm2-135m/l15", "index": shipped, "op": "scale", "value": -2.0}],
            "vectors": [push | {"layers": [15, 28]}, push | {"apply": {"phase": "prompt"}}],
            "when": [when("test/jumprelu", "<", 0.5), when("test/relu", ">=", 0.01)],
            "apply": {"preserve_norm": True, "skip_first": 2},
        },
    }
