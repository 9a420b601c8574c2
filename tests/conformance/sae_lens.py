"""SAELens 6: every architecture and normalisation that it saves, and the configurations of versions 2 to 5.

`python -m tests.conformance.sae_lens OUT`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sae_lens
import torch
import yaml
from sae_lens import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import save_file

from tests.conformance.expected import Answer, write_expected, write_refused
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "sae_lens"
K = 3
D_OUT = 12
"""Of transcoders: unlike d_in, so that a transposed matrix cannot pass."""

SCALING_FACTOR = 0.5
"""sqrt(d_in) / E[norm of x]: a power of two, for exact arithmetic."""

RESIDUAL = "blocks.3.hook_resid_post"
METADATA = {
    "model_name": "gpt2-small",
    "hook_name": RESIDUAL,
    "hook_head_index": None,
    "prepend_bos": True,
    "context_size": 128,
    "dataset_path": "Skylion007/openwebtext",
    "model_from_pretrained_kwargs": {},
}
TRANSCODER_METADATA = METADATA | {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
TOPK = ("topk", "abstopk")


def random_whitening() -> ActivationWhitening:
    weights = random_weights(600)
    # Without an eigendecomposition, whose signs no two processors agree on.
    matrix = weights["W_enc"][:, -D_IN:].double() + 2.0 * torch.eye(D_IN, dtype=torch.float64)
    return ActivationWhitening(weights["b_dec"].double(), matrix, torch.linalg.inv(matrix))


def leave(sae: SAE) -> None:
    """Nothing to do before saving."""


def calibrate(sae: TrainingSAE) -> None:
    sae.topk_threshold.fill_(EXACT_THRESHOLD)


def fold_average(sae: SAE) -> None:
    sae.fold_activation_norm_scaling_factor(SCALING_FACTOR)


def fold_whitening(sae: SAE) -> None:
    whitening = random_whitening()
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


@dataclass(frozen=True)
class Case:
    """One SAE.

    config: of SAELens, beyond the sizes.
    training: built by the training class and saved by `save_inference_model`, which turns BatchTopK into JumpReLU.
    before_saving: what the trainer does to it at its end.
    inputs: for `make_inputs`.
    scaler: saved beside it, as in the checkpoints that the trainer writes on its way.
    after_loading: what makes the answer right where `SAE.load_from_disk` leaves something out without a word.
    note: further metadata.
    """

    name: str
    config: dict[str, Any]
    training: bool = False
    before_saving: Callable[[SAE], None] = leave
    inputs: dict[str, Any] = field(default_factory=dict)
    scaler: ActivationScaler | None = None
    after_loading: Callable[[SAE], None] = leave
    note: dict[str, str] = field(default_factory=dict)


NO_B_DEC = {"apply_b_dec_to_input": False}
AT_THRESHOLD = {"threshold": EXACT_THRESHOLD}
RESCALED = {"rescale_acts_by_decoder_norm": True}
LAYER_NORM = {"normalize_activations": "layer_norm"}
CONSTANT_NORM = {"normalize_activations": "constant_norm_rescale"}
AVERAGE = {"normalize_activations": "expected_average_only_in"}
WHITENING = {"normalize_activations": "covariance_whitening"}
TRANSCODER = {"d_out": D_OUT, "apply_b_dec_to_input": False, "metadata": TRANSCODER_METADATA}
STANDARD, GATED, JUMPRELU = ({"architecture": name} for name in ("standard", "gated", "jumprelu"))
TOPK_CONFIG, ABSTOPK = ({"architecture": name, "k": K, "rescale_acts_by_decoder_norm": False} for name in TOPK)
BATCHTOPK = {"architecture": "batchtopk", "k": float(K), "rescale_acts_by_decoder_norm": False}
MATRYOSHKA = BATCHTOPK | {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [8, 24, D_SAE]}
# Decoder norms are folded into what is saved; that of the exact feature is 2.
AT_RESCALED_THRESHOLD = {"threshold": EXACT_THRESHOLD / 2}
SCALED = {"scale": SCALING_FACTOR}
NEEDS_FACTOR = {"norm_scaling_factor": str(SCALING_FACTOR), "saelens": "load_from_disk leaves the factor out"}
NEEDS_WHITENING = {"saelens": "load_from_disk leaves the whitening out"}

CASES = (
    Case("standard", STANDARD),
    Case("standard_without_b_dec", STANDARD | NO_B_DEC, inputs={"subtracts_b_dec": False}),
    Case("gated", GATED),
    Case("gated_without_b_dec", GATED | NO_B_DEC, inputs={"subtracts_b_dec": False}),
    Case("topk", TOPK_CONFIG),
    Case("topk_rescaled", TOPK_CONFIG | RESCALED),
    Case("topk_layer_norm", TOPK_CONFIG | LAYER_NORM),
    Case("abstopk", ABSTOPK),
    Case("abstopk_rescaled", ABSTOPK | RESCALED),
    Case("jumprelu", JUMPRELU, inputs=AT_THRESHOLD),
    Case("jumprelu_without_b_dec", JUMPRELU | NO_B_DEC, inputs=AT_THRESHOLD | {"subtracts_b_dec": False}),
    Case("transcoder", TRANSCODER | {"architecture": "transcoder"}, inputs={"subtracts_b_dec": False}),
    Case("skip_transcoder", TRANSCODER | {"architecture": "skip_transcoder"}, inputs={"subtracts_b_dec": False}),
    Case(
        "jumprelu_transcoder",
        TRANSCODER | {"architecture": "jumprelu_transcoder"},
        inputs=AT_THRESHOLD | {"subtracts_b_dec": False},
    ),
    Case(
        "jumprelu_skip_transcoder",
        TRANSCODER | {"architecture": "jumprelu_skip_transcoder"},
        inputs=AT_THRESHOLD | {"subtracts_b_dec": False},
    ),
    Case("standard_layer_norm", STANDARD | LAYER_NORM),
    Case("jumprelu_layer_norm", JUMPRELU | LAYER_NORM),
    Case("standard_constant_norm", STANDARD | CONSTANT_NORM, inputs={"zeros": False}),
    Case("gated_constant_norm", GATED | CONSTANT_NORM, inputs={"zeros": False}),
    Case("standard_trained", STANDARD, training=True),
    Case("gated_trained", GATED, training=True),
    Case("jumprelu_trained", JUMPRELU, training=True, inputs=AT_THRESHOLD),
    Case("topk_trained_rescaled", TOPK_CONFIG | RESCALED, training=True),
    Case("batchtopk", BATCHTOPK, training=True, before_saving=calibrate, inputs=AT_THRESHOLD),
    Case(
        "batchtopk_rescaled",
        BATCHTOPK | RESCALED,
        training=True,
        before_saving=calibrate,
        inputs=AT_RESCALED_THRESHOLD,
    ),
    Case("matryoshka_batchtopk", MATRYOSHKA, training=True, before_saving=calibrate, inputs=AT_THRESHOLD),
    Case("average_folded", STANDARD | AVERAGE, training=True, before_saving=fold_average, inputs=SCALED),
    Case("average", STANDARD | AVERAGE, inputs=SCALED, after_loading=fold_average, note=NEEDS_FACTOR),
    Case(
        "average_jumprelu",
        JUMPRELU | AVERAGE,
        inputs=SCALED | AT_THRESHOLD,
        after_loading=fold_average,
        note=NEEDS_FACTOR,
    ),
    Case(
        "average_checkpoint",
        STANDARD | AVERAGE,
        inputs=SCALED,
        scaler=ActivationScaler(SCALING_FACTOR),
        after_loading=fold_average,
        note=NEEDS_FACTOR,
    ),
    Case("whitening_folded", STANDARD | WHITENING, training=True, before_saving=fold_whitening),
    Case("whitening_folded_without_b_dec", GATED | WHITENING | NO_B_DEC, training=True, before_saving=fold_whitening),
    Case(
        "whitening_checkpoint",
        STANDARD | WHITENING,
        scaler=ActivationScaler(whitening=random_whitening()),
        after_loading=fold_whitening,
        note=NEEDS_WHITENING,
    ),
)


def describe(case: str, klass: type, checkpoint: str) -> dict[str, str]:
    return {
        "family": FAMILY,
        "library": "sae-lens",
        "version": sae_lens.__version__,
        "class": klass.__name__,
        "case": case,
        "checkpoint": checkpoint,
    }


def answer(sae: SAE, x: torch.Tensor) -> Answer:
    # forward rather than decode: it is what adds a skip connection.
    return sae.encode(x), sae.forward(x)


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "metadata": METADATA} | config


def fill(sae: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[name])


def write(out: Path, case: Case, seed: int) -> None:
    config = sizes(case.config)
    checkpoint = config["metadata"]["hook_name"]
    folder = out / case.name / checkpoint
    sae = (TrainingSAE if case.training else SAE).from_dict(config)
    # Few features of a TopK SAE are above zero, so that some inputs have fewer than k.
    fill(sae, random_weights(seed, d_out=config.get("d_out"), mean_bias=-1.0 if "k" in config else 0.0))
    case.before_saving(sae)
    (sae.save_inference_model if case.training else sae.save_model)(folder)
    if case.scaler is not None:
        case.scaler.save(str(folder / "activation_scaler.json"))
    write_answer(out, case, seed, checkpoint)


def write_answer(out: Path, case: Case, seed: int, checkpoint: str) -> None:
    """The answer of what SAELens' own disk loader reads from the folder."""
    folder = out / case.name / checkpoint
    sae = SAE.load_from_disk(folder)
    inputs = make_inputs(seed, sae.W_enc.detach(), **case.inputs)
    others = {}
    if case.after_loading is not leave:
        with torch.no_grad():
            unfolded = answer(SAE.load_from_disk(folder), inputs.x)
        others = dict(zip(("saelens_activations", "saelens_reconstruction"), unfolded, strict=True))
        case.after_loading(sae)
    write_expected(
        out / case.name / "expected.safetensors",
        description=describe(case.name, type(sae), checkpoint) | case.note,
        model=sae,
        answer=answer,
        inputs=inputs,
        ties=sae.cfg.architecture() in TOPK,
        others=others,
    )


# The configurations of older versions, as they lie in published repositories. SAELens 6 reads them and is what answers.
OLDEST = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.3.hook_resid_pre",
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "d_in": D_IN,
    "expansion_factor": D_SAE // D_IN,
    "d_sae": D_SAE,
    "b_dec_init_method": "mean",
    "lr": 0.0004,
    "l1_coefficient": 8e-05,
    "dtype": "torch.float32",
    "device": "cuda",
}
VERSION_3 = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "gpt2-small",
    "hook_name": RESIDUAL,
    "hook_layer": 3,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "dataset_trust_remote_code": True,
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "device": "cuda:0",
    "sae_lens_training_version": "3.22.1",
    "activation_fn_kwargs": {},
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
}
BASE = ("W_enc", "b_enc", "W_dec", "b_dec")

LEGACY = (
    # Written while every checkpoint had a scaling factor for fine-tuning, mostly of ones.
    (Case("legacy_hook_point", OLDEST), (*BASE, "scaling_factor")),
    (Case("legacy_standard", VERSION_3 | NO_B_DEC, inputs={"subtracts_b_dec": False}), BASE),
    (Case("legacy_gated", VERSION_3 | GATED), ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")),
    (
        Case("legacy_topk", VERSION_3 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        BASE,
    ),
    (Case("legacy_jumprelu", VERSION_3 | JUMPRELU, inputs=AT_THRESHOLD), (*BASE, "threshold")),
    (Case("legacy_normalize_null", VERSION_3 | {"normalize_activations": None}), BASE),
    (
        Case(
            "legacy_average_boolean",
            VERSION_3 | {"normalize_activations": True},
            inputs=SCALED,
            after_loading=fold_average,
            note=NEEDS_FACTOR,
        ),
        BASE,
    ),
)


def write_legacy(out: Path, case: Case, tensors: tuple[str, ...], seed: int) -> None:
    checkpoint = case.config.get("hook_point", RESIDUAL)
    folder = out / case.name / checkpoint
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(case.config))
    topk = case.config.get("activation_fn_str") == "topk"
    weights = random_weights(seed, mean_bias=-1.0 if topk else 0.0) | {"scaling_factor": torch.ones(D_SAE)}
    save_file({name: weights[name].contiguous() for name in tensors}, folder / "sae_weights.safetensors")
    write_answer(out, case, seed, checkpoint)


TEMPORAL_PUBLISHED = {
    "llm": {"dimin": D_IN},
    "sae": {
        "exp_factor": D_SAE / D_IN,
        "n_heads": 2,
        "n_attn_layers": 1,
        "bottleneck_factor": 2,
        "sae_diff_type": "topk",
        "kval_topk": K,
        "tied_weights": False,
        "scaling_factor": SCALING_FACTOR,
    },
    "data": {"dtype": "float32"},
}


def write_refusals(out: Path) -> None:
    """What needs more than one token at a time, or what nothing can be computed with."""

    def refuse(case: str, klass: type, reason: str, checkpoint: str = RESIDUAL) -> None:
        write_refused(out / case / "expected.safetensors", description=describe(case, klass, checkpoint), reason=reason)

    temporal = SAE.from_dict(
        sizes({"architecture": "temporal", "n_heads": 2, "bottleneck_factor": 2, "kval_topk": K, "tied_weights": True})
    )
    temporal.save_model(out / "temporal" / RESIDUAL)
    refuse("temporal", type(temporal), "its codes depend on the tokens before")

    # As its authors publish it; SAELens' loader for their repository names the files and tensors.
    weights = random_weights(89)
    published = out / "temporal_published" / "layer_3" / "temporal"
    published.mkdir(parents=True)
    tensors = {"D": weights["W_dec"], "E": weights["W_enc"], "b": weights["b_dec"]}
    tensors |= {name: tensor for name, tensor in temporal.state_dict().items() if name.startswith("attn_layers.")}
    save_file(tensors, published / "latest_ckpt.safetensors")
    (published / "conf.yaml").write_text(yaml.safe_dump(TEMPORAL_PUBLISHED))
    refuse("temporal_published", type(temporal), "its codes depend on the tokens before", "layer_3/temporal")

    pursuit = SAE.from_dict(sizes({"architecture": "matching_pursuit"}))
    pursuit.save_model(out / "matching_pursuit" / RESIDUAL)
    refuse("matching_pursuit", type(pursuit), "every feature needs an encode of what the others left")

    batchtopk = TrainingSAE.from_dict(sizes(BATCHTOPK))
    fill(batchtopk, random_weights(90))
    batchtopk.save_model(out / "batchtopk_checkpoint" / RESIDUAL)
    refuse(
        "batchtopk_checkpoint",
        type(batchtopk),
        "a checkpoint of training: no thresholds, save_inference_model adds them",
    )

    finetuned = out / "legacy_finetuned" / RESIDUAL
    finetuned.mkdir(parents=True)
    weights = random_weights(91)
    tensors = {name: weights[name] for name in BASE} | {"scaling_factor": weights["threshold"] + 1.0}
    save_file(tensors, finetuned / "sae_weights.safetensors")
    (finetuned / "cfg.json").write_text(json.dumps(VERSION_3 | {"finetuning_scaling_factor": True}))
    try:
        SAE.load_from_disk(finetuned)
    except RuntimeError as error:
        refuse("legacy_finetuned", SAE, f"SAELens 6 refuses it too: {str(error).splitlines()[-1].strip()}")
    else:
        raise ValueError("SAELens reads a scaling factor for fine-tuning: legacy_finetuned needs its answer")


def main(out: Path) -> None:
    torch.manual_seed(0)
    for seed, case in enumerate(CASES):
        write(out, case, seed)
    for seed, (case, tensors) in enumerate(LEGACY, start=len(CASES)):
        write_legacy(out, case, tensors, seed)
    write_refusals(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
