"""dictionary_learning: each dictionary class, saved by its own trainer's `trainSAE`.

`python -m tests.conformance.dictionary_learning OUT`. The environment has SAELens too, whose loader for this family is
asked for its answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from dictionary_learning.dictionary import AutoEncoderNew, Dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.trainers.trainer import SAETrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders

from tests.conformance.expected import Answer, write_expected, write_refused
from tests.conformance.inputs import make_inputs
from tests.conformance.weights import D_IN, D_SAE, EXACT_THRESHOLD, random_weights

FAMILY = "dictionary_learning"
K = 3
LAYER = 3
GROUP_FRACTIONS = [1 / 6, 1 / 3, 1 / 2]

TENSORS = {
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "decoder.bias": "b_dec",
    "encoder.bias": "b_enc",
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
"""Its names of what `random_weights` makes; the weights of linear layers are transposed."""


class AutoEncoderNewTrainer(StandardTrainerAprilUpdate):
    """The releases of `AutoEncoderNew` come from a trainer that the library no longer has; only the name differs."""

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"dict_class": "AutoEncoderNew"}


@dataclass(frozen=True)
class Case:
    """threshold: of the classes that calibrate one; -1 is what they start with. inputs: for `make_inputs`."""

    name: str
    trainer: type[SAETrainer]
    settings: dict[str, Any] = field(default_factory=dict)
    threshold: float = EXACT_THRESHOLD
    inputs: dict[str, Any] = field(default_factory=dict)
    hook: str = f"resid_post_layer_{LAYER}"

    @property
    def checkpoint(self) -> str:
        return f"{self.hook}/trainer_0"


AT_THRESHOLD = {"threshold": EXACT_THRESHOLD}
NOT_SUBTRACTED = {"subtracts_b_dec": False}
CASES = (
    Case("standard", StandardTrainer),
    Case("standard_april_update", StandardTrainerAprilUpdate),
    Case("standard_mlp_out", StandardTrainer, hook=f"mlp_out_layer_{LAYER}"),
    Case("new", AutoEncoderNewTrainer, {"dict_class": AutoEncoderNew}, inputs=NOT_SUBTRACTED),
    Case("gated", GatedSAETrainer),
    Case("jumprelu", JumpReluTrainer, inputs=AT_THRESHOLD | NOT_SUBTRACTED),
    Case("topk", TopKTrainer, {"k": K}),
    Case("topk_uncalibrated", TopKTrainer, {"k": K}, threshold=-1.0),
    Case("batchtopk", BatchTopKTrainer, {"k": K}, inputs=AT_THRESHOLD),
    Case("matryoshka", MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": GROUP_FRACTIONS}, inputs=AT_THRESHOLD),
)
UNCALIBRATED = (
    Case("batchtopk_uncalibrated", BatchTopKTrainer, {"k": K}, threshold=-1.0),
    Case(
        "matryoshka_uncalibrated",
        MatryoshkaBatchTopKTrainer,
        {"k": K, "group_fractions": GROUP_FRACTIONS},
        threshold=-1.0,
    ),
)


class NoActivations:
    """Stands in for the activation buffer, of which nothing is trained on: an empty one with its configuration."""

    config = {  # noqa: RUF012
        "d_submodule": D_IN,
        "io": "out",
        "n_ctxs": 244,
        "ctx_len": 1024,
        "refresh_batch_size": 4,
        "out_batch_size": 2048,
        "device": "cpu",
    }

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(())


def fill(dictionary: Dictionary, weights: dict[str, torch.Tensor], threshold: float) -> None:
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            value = weights[TENSORS.get(name, name)]
            parameter.copy_(value.T if name.endswith(".weight") else value)
        if "threshold" in dict(dictionary.named_buffers()):
            dictionary.threshold.fill_(threshold)


def save(out: Path, case: Case, seed: int) -> None:
    """Write the checkpoint as `trainSAE` does, after no step of training."""

    def filled_trainer(**settings: Any) -> SAETrainer:
        trainer = case.trainer(**settings)
        fill(trainer.ae, random_weights(seed, mean_bias=-1.0 if "k" in settings else 0.0), case.threshold)
        return trainer

    settings = {
        "trainer": filled_trainer,
        "steps": 10_000,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": LAYER,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": case.hook,
        "device": "cpu",
        **case.settings,
    }
    trainSAE(NoActivations(), [settings], steps=0, save_dir=str(out / case.name / case.hook), device="cpu")


def describe(case: Case, klass: type) -> dict[str, str]:
    return {
        "family": FAMILY,
        "library": "dictionary-learning",
        "version": version("dictionary-learning"),
        "class": klass.__name__,
        "case": case.name,
        "checkpoint": case.checkpoint,
    }


def answer(dictionary: Dictionary, x: torch.Tensor) -> Answer:
    activations = dictionary.encode(x)
    return activations, dictionary.decode(activations)


def saelens(folder: Path, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What SAELens makes of the same folder: its answer, or its error."""

    def local_file(repo_id: str, filename: str, **_: Any) -> str:
        return str(folder.parent / filename)

    try:
        with mock.patch.object(pretrained_sae_loaders, "hf_hub_download", local_file), torch.no_grad():
            sae = SAE.from_pretrained(
                "some/repository",
                folder.name,
                converter=pretrained_sae_loaders.dictionary_learning_sae_huggingface_loader_1,
            )
            given = {"saelens_activations": sae.encode(x), "saelens_reconstruction": sae(x)}
    except Exception as error:
        return {}, {"saelens_error": f"{type(error).__name__}: {error}", "saelens_version": version("sae-lens")}
    return given, {
        "saelens_class": type(sae).__name__,
        "saelens_hook_name": sae.cfg.metadata.hook_name,
        "saelens_version": version("sae-lens"),
    }


def write(out: Path, case: Case, seed: int) -> None:
    save(out, case, seed)
    folder = out / case.name / case.checkpoint
    # load_dictionary folds the decoder norms of an AutoEncoder into its activations; the class itself does not.
    folded, _ = load_dictionary(str(folder), "cpu")
    dictionary = type(folded)(*_arguments(case))
    dictionary.load_state_dict(torch.load(folder / "ae.pt", weights_only=True))
    inputs = make_inputs(seed, random_weights(seed)["W_enc"], **case.inputs)
    others, notes = saelens(folder, inputs.x)
    with torch.no_grad():
        others |= dict(zip(("loaded_activations", "loaded_reconstruction"), answer(folded, inputs.x), strict=True))
    write_expected(
        out / case.name / "expected.safetensors",
        description=describe(case, type(dictionary)) | notes,
        model=dictionary,
        answer=answer,
        inputs=inputs,
        ties=case.trainer is TopKTrainer,
        others=others,
    )


def _arguments(case: Case) -> list[Any]:
    sizes: list[Any] = [D_IN, D_SAE]
    if "k" in case.settings:
        sizes.append(case.settings["k"])
    if "group_fractions" in case.settings:
        sizes.append([round(fraction * D_SAE) for fraction in GROUP_FRACTIONS])
    return sizes


def main(out: Path) -> None:
    for seed, case in enumerate(CASES, start=100):
        write(out, case, seed)
    for seed, case in enumerate(UNCALIBRATED, start=150):
        save(out, case, seed)
        folded, _ = load_dictionary(str(out / case.name / case.checkpoint), "cpu")
        write_refused(
            out / case.name / "expected.safetensors",
            description=describe(case, type(folded)),
            reason="threshold is -1: training ended before it was calibrated",
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]) / FAMILY)
