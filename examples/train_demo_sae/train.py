"""Train an SAE with SAELens on harvested activations and save it as the project ships it.

SAELens' own runner feeds its trainer from a live model; here the activations come from a file, so that several SAEs can
be trained on one harvest. All else (architecture, loss, schedule, checkpoints, saving) is SAELens'. An interrupted
run continues from its last checkpoint.
"""

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import numpy as np
import torch
import typer
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

HELD_OUT = 0.04
"""Share of the activations, at the end of the file, that training never sees."""

OUTLIER = 10
"""Tokens whose norm is over so many times the median are attention sinks in mid-sequence: left out everywhere."""

CHECKPOINTS = 8


class Architecture(str, Enum):
    topk = "topk"
    jumprelu = "jumprelu"


def open_activations(path: Path, d_in: int) -> tuple[np.ndarray, np.ndarray]:
    """(training part, held-out part), each [tokens, d_in] float16, without outliers."""
    data = np.memmap(path, dtype=np.float16, mode="r").reshape(-1, d_in)
    norms = np.concatenate([np.linalg.norm(part.astype(np.float32), axis=1) for part in np.array_split(data, 256)])
    data = data[norms <= OUTLIER * np.median(norms)]
    typer.echo(f"{len(norms):,} tokens, {len(norms) - len(data):,} outliers left out")
    split = int(len(data) * (1 - HELD_OUT))
    return data[:split], data[split:]


def batches(data: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Random batches without end, each token once per pass."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data))
        for start in range(0, len(order) - size + 1, size):
            # Sorted within the batch: the file is read forwards.
            yield torch.from_numpy(data[np.sort(order[start : start + size])].astype(np.float32))


def untrained(architecture: Architecture, d_in: int, d_sae: int, l0: int, bandwidth: float) -> TrainingSAE:
    """A TopK SAE with k = l0, or a JumpReLU SAE that is pulled towards l0 active features (Gemma Scope 2's loss)."""
    shape = {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}
    if architecture is Architecture.topk:
        return TopKTrainingSAE(
            TopKTrainingSAEConfig(**shape, k=l0, apply_b_dec_to_input=True, aux_loss_coefficient=1 / 32)
        )
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            **shape,
            apply_b_dec_to_input=True,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=l0,
            jumprelu_bandwidth=bandwidth,
            jumprelu_ste_to_input=True,
            pre_act_loss_coefficient=3e-6,
        )
    )


@torch.no_grad()
def start_from(sae: TrainingSAE, folder: Path, data: np.ndarray) -> None:
    """Give `sae` the dictionary of a TopK SAE that this script saved.

    A JumpReLU SAE gets one threshold for all its features, at which its L0 on a sample is the target.
    """
    w = load_file(folder / "sae_weights.safetensors")
    sample = torch.from_numpy(data[:: max(1, len(data) // 8192)].astype(np.float32))
    # Training sees activations scaled to norm sqrt(d_in); the decoder's rows have norm 1 on both sides.
    scale = float(sae.cfg.d_in**0.5 / sample.norm(dim=1).mean())
    sae.W_enc.data = w["W_enc"].float()
    sae.W_dec.data = w["W_dec"].float()
    sae.b_enc.data = w["b_enc"].float() * scale
    sae.b_dec.data = w["b_dec"].float() * scale
    if isinstance(sae, JumpReLUTrainingSAE):
        pre_acts = (scale * sample - sae.b_dec) @ sae.W_enc + sae.b_enc
        kept = int(sae.cfg.target_l0 * len(sample))
        sae.threshold.data.fill_(float(pre_acts.flatten().topk(kept).values[-1]))


def resume(trainer: SAETrainer, checkpoints: Path) -> None:
    """Continue from the newest whole checkpoint, if there is one."""
    done = sorted((int(path.parent.name), path.parent) for path in checkpoints.glob("*/trainer_state.pt"))
    if done:
        samples, folder = done[-1]
        trainer.sae.load_weights_from_checkpoint(folder)
        trainer.load_trainer_state(folder)
        typer.echo(f"continuing after {samples:,} samples")


@torch.no_grad()
def held_out_metrics(folder: Path, data: np.ndarray) -> dict[str, float]:
    """Explained variance, L0 and dead features of the saved SAE, in float64, by the definition of its format."""
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    k = json.loads((folder / "cfg.json").read_text()).get("k")
    n = len(data)
    fired = torch.zeros(w["W_enc"].shape[1], dtype=torch.int64)
    error = squares = active = 0.0
    total = torch.zeros(data.shape[1], dtype=torch.float64)
    for start in range(0, n, 4096):
        x = torch.from_numpy(data[start : start + 4096].astype(np.float64))
        f = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        if k is None:
            f = f.relu() * (f > w["threshold"])
        else:
            top = f.topk(k, dim=-1)
            f = torch.zeros_like(f).scatter(1, top.indices, top.values.relu())
        error += float((x - f @ w["W_dec"] - w["b_dec"]).square().sum())
        squares += float(x.square().sum())
        total += x.sum(0)
        active += float((f > 0).sum())
        fired += (f > 0).sum(0)
    variance = squares / n - float((total / n).square().sum())
    return {
        "explained_variance": 1 - error / n / variance,
        "l0": active / n,
        "dead_features": float((fired == 0).double().mean()),
        "held_out_tokens": n,
    }


def main(
    activations: Path,
    layer: int,
    out: Path,
    architecture: Architecture = Architecture.topk,
    d_in: int = 576,
    expansion: int = 8,
    l0: int = 32,
    initial: Path | None = None,
    bandwidth: float = 0.2,
    samples: int = 6_000_000,
    batch: int = 2048,
    learning_rate: float = 4e-4,
    seed: int = 0,
) -> None:
    """Train an SAE on ACTIVATIONS of LAYER and save it in OUT.

    l0: active features per token. initial: a TopK SAE of this layer to start from, which a JumpReLU SAE needs: from
    scratch most of its features die. bandwidth: JumpReLU's, in units of an input of norm sqrt(d_in).
    """
    torch.manual_seed(seed)
    train, held_out = open_activations(activations, d_in)
    checkpoints = out / "checkpoints"
    sae = untrained(architecture, d_in, expansion * d_in, l0, bandwidth)
    if initial is not None:
        start_from(sae, initial, train)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=batch,
            lr=learning_rate,
            lr_end=learning_rate / 10,
            lr_warm_up_steps=100,
            lr_decay_steps=samples // batch // 3,
            dead_feature_window=300,
            n_batches_for_norm_estimate=50,
            n_checkpoints=CHECKPOINTS,
            checkpoint_path=str(checkpoints),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(train, batch, seed),
    )
    resume(trainer, checkpoints)
    trained = trainer.fit()
    # Activations are in the units of the residual stream's own directions; for TopK, ranking by pre-activation times
    # decoder norm becomes ranking by pre-activation.
    trained.fold_W_dec_norm()
    if architecture is Architecture.topk:
        trained.cfg.rescale_acts_by_decoder_norm = False
    trained.save_inference_model(str(out))
    save_for_serving(out, layer)
    metrics = held_out_metrics(out, held_out) | {
        "training_tokens": len(train),
        "samples": samples,
        "passes": round(samples / len(train), 2),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    typer.echo(json.dumps(metrics, indent=1))


def save_for_serving(folder: Path, layer: int) -> None:
    """Half precision, and the metadata that the server reads."""
    weights = load_file(folder / "sae_weights.safetensors")
    kept = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold") if name in weights]
    save_file({name: weights[name].to(torch.float16).contiguous() for name in kept}, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text())
    config["dtype"] = "float16"
    config["device"] = "cpu"
    config["metadata"] |= {
        "model_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": 256,
        "prepend_bos": False,
        "steer_server": {"name": f"smollm2-135m/l{layer}", "skip_first": 1},
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    for extra in ("sparsity.safetensors", "runner_cfg.json"):
        (folder / extra).unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
