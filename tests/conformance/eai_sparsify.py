"""EleutherAI's sparsify: SparseCoder with TopK and GroupMax, as an SAE and as a transcoder.

`python -m tests.conformance.eai_sparsify OUT`. The environment has SAELens too, whose loader for this family is asked
for its answer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.__main__ import RunConfig

from tests.conformance.expected import Answer, write_expected
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, random_weights

FAMILY = "sparsify"
K = 3
RUN = "pythia-160m-run"
TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
"""Its names of what `random_weights` makes, where they differ; the encoder's weight is transposed."""


@dataclass(frozen=True)
class Case:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    hookpoint: str = "layers.3"


WIDTH = {"num_latents": D_SAE, "k": K}
TRANSCODE = WIDTH | {"transcode": True}
CASES = (
    Case("topk", WIDTH),
    Case("topk_decoder_not_normalized", WIDTH | {"normalize_decoder": False}),
    Case("topk_expansion_factor", {"expansion_factor": D_SAE // D_IN, "k": K}),
    Case("topk_mlp", WIDTH, hookpoint="layers.3.mlp"),
    Case("topk_embed_tokens", WIDTH, hookpoint="embed_tokens"),
    Case("groupmax", WIDTH | {"activation": "groupmax"}),
    Case("transcode", TRANSCODE, hookpoint="layers.3.mlp"),
    Case("transcode_skip", TRANSCODE | {"skip_connection": True}, hookpoint="layers.3.mlp"),
    Case("topk_skip", WIDTH | {"skip_connection": True}),
)


def describe(case: Case) -> dict[str, str]:
    return {
        "family": FAMILY,
        "library": "eai-sparsify",
        "version": version("eai-sparsify"),
        "class": "SparseCoder",
        "case": case.name,
        "checkpoint": f"{RUN}/{case.hookpoint}",
    }


def build(case: Case, seed: int) -> SparseCoder:
    coder = SparseCoder(D_IN, SparseCoderConfig(**case.settings))
    # Few features are above zero, so that some inputs have fewer than k.
    weights = random_weights(seed, mean_bias=-1.0)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            value = weights[TENSORS.get(name, name)]
            parameter.copy_(value.T if name == "encoder.weight" else value)
    if coder.cfg.normalize_decoder:
        coder.set_decoder_norm_to_unit_norm()
    return coder


def answer(coder: SparseCoder, x: torch.Tensor) -> Answer:
    forward = coder(x)
    activations = x.new_zeros(len(x), coder.num_latents)
    return activations.scatter(1, forward.latent_indices, forward.latent_acts), forward.sae_out


def saelens(folder: Path, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What SAELens makes of the same folder: the error that its loader ends in, and the answer behind it.

    The loader transposes W_dec, which sparsify stores as [d_sae, d_in], and takes `num_latents: 0` for a width, where
    it stands for `expansion_factor`. With both put right, its answer shows what else it takes differently: b_dec, the
    skip connection, the hook point.
    """
    notes = {"saelens_version": version("sae-lens")}
    try:
        SAE.load_from_disk(folder, converter=sparsify_disk_loader)
    except RuntimeError as error:
        notes["saelens_error"] = str(error)
    else:
        raise ValueError(f"{folder}: SAELens loads it now, its answer needs no repair")

    def repaired(path: Path, device: str, cfg_overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        config, tensors = sparsify_disk_loader(path, device, cfg_overrides)
        return config | {"d_sae": tensors["W_enc"].shape[1]}, tensors | {"W_dec": tensors["W_dec"].T}

    with torch.no_grad():
        sae = SAE.load_from_disk(folder, converter=repaired, dtype="float32")
        answers = {"saelens_activations": sae.encode(x), "saelens_reconstruction": sae(x)}
    return answers, notes | {"saelens_class": type(sae).__name__, "saelens_hook_name": sae.cfg.metadata.hook_name}


def write(out: Path, case: Case, seed: int) -> None:
    coder = build(case, seed)
    run = out / case.name / RUN
    coder.save_to_disk(run / case.hookpoint)
    RunConfig(
        sae=coder.cfg,
        model="EleutherAI/pythia-160m",
        dataset="EleutherAI/the_pile_deduplicated",
        hookpoints=[case.hookpoint],
        run_name=RUN,
        data_preprocessing_num_proc=1,
    ).save_json(run / "config.json")
    loaded = SparseCoder.load_from_disk(run / case.hookpoint)
    transcoder = case.settings.get("transcode", False)
    inputs = make_inputs(seed, random_weights(seed)["W_enc"], subtracts_b_dec=not transcoder)
    others, notes = saelens(run / case.hookpoint, inputs.x)
    write_expected(
        out / case.name / "expected.safetensors",
        description=describe(case) | notes,
        model=loaded,
        answer=answer,
        inputs=inputs,
        ties=True,
        others=others,
    )


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=200):
        write(out, case, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / FAMILY)
