"""Steering by Hugging Face transformers and forward hooks, in fp32, straight from the request's JSON.

Independent of the code under test: nothing of steer_server, sae_models or steer_kernels is used here.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


class OracleSAE:
    """A SAELens folder, its activations by the definitions of SAELens' `encode` methods."""

    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "cfg.json").read_text())
        with safe_open(Path(folder) / "sae_weights.safetensors", framework="pt") as file:
            self.w = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        self.layer = int(self.config["metadata"]["hook_name"].split(".")[1])
        self.skip_first = self.config["metadata"].get("steer_server", {}).get("skip_first", 0)
        self.rescaled = self.config.get("rescale_acts_by_decoder_norm", False)

    def encode(self, x):
        """[tokens, d_sae] activations of x [tokens, d_in]."""
        w = self.w
        sae_in = x.double() - w["b_dec"] if self.config["apply_b_dec_to_input"] else x.double()
        pre = sae_in @ w["W_enc"] + w["b_enc"]
        if self.config["architecture"] == "standard":
            return pre.relu()
        if self.config["architecture"] == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        if self.rescaled:
            pre = pre * w["W_dec"].norm(dim=-1)
        top = pre.topk(self.config["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decoder(self, feature):
        row = self.w["W_dec"][feature]
        return row / row.norm() if self.rescaled else row


def inline_rows(data):
    raw = base64.b64decode(data["data"])
    if data["dtype"] == "bfloat16":
        values = (np.frombuffer(raw, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, dtype=data["dtype"])
    return torch.from_numpy(values.astype(np.float64)).reshape(data["shape"]).reshape(-1, data["shape"][-1])


class Oracle:
    """The model, and the SAEs by name."""

    def __init__(self, model_dir, saes=None):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self.saes = {name: OracleSAE(folder) for name, folder in (saes or {}).items()}

    @torch.inference_mode()
    def logprobs(self, tokens, prompt_len, spec=None):
        """[len(tokens), vocab] log-probabilities of each next token; positions past prompt_len are generated."""
        handles = []
        for index, layer in enumerate(self.model.model.layers):
            hook = self._hook(index, len(tokens), prompt_len, spec) if spec else None
            if hook is not None:
                handles.append(layer.register_forward_hook(hook))
        try:
            logits = self.model(torch.tensor([tokens])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def residual(self, tokens, layer):
        """[len(tokens), d_model]: the stream after `layer`, unsteered."""
        return self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[layer + 1][0]

    def _hook(self, layer, length, prompt_len, spec):
        """A hook that edits layer's output, or None where the spec leaves it alone."""
        features = [f for f in spec.get("features", []) if self.saes[f["sae"]].layer == layer]
        vectors = [v for v in spec.get("vectors", []) if layer in v["layers"]]
        if not features and not vectors:
            return None
        masks = [self._mask(e, spec, length, prompt_len) for e in (*features, *vectors)]

        def hook(module, inputs, output):
            h = output[0].double() if output.dim() == 3 else output.double()
            delta = torch.zeros_like(h)
            for entry, mask in zip((*features, *vectors), masks, strict=True):
                change = self._feature_delta(entry, h) if "sae" in entry else self._vector_delta(entry, layer, h)
                delta += torch.where(mask[:, None], change, 0.0)
            edited = h + delta
            if spec.get("apply", {}).get("preserve_norm"):
                scale = h.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True)
                touched = torch.stack(masks).any(0)
                edited = torch.where(touched[:, None], edited * scale, edited)
            return edited.float().reshape(output.shape)

        return hook

    def _mask(self, entry, spec, length, prompt_len):
        apply = spec.get("apply", {}) | entry.get("apply", {})
        skip = apply.get("skip_first", self.saes[entry["sae"]].skip_first if "sae" in entry else 0)
        position = torch.arange(length)
        phase = {
            "all": torch.ones(length, dtype=torch.bool),
            "prompt": position < prompt_len,
            "generation": position >= prompt_len,
        }[apply.get("phase", "all")]
        return phase & (position >= skip)

    def _feature_delta(self, entry, h):
        sae = self.saes[entry["sae"]]
        f = sae.encode(h)[:, entry["index"]]
        a = entry.get("value", 0.0)
        g = {
            "set": torch.full_like(f, a),
            "add": f + a,
            "min": f.clamp(min=a),
            "max": f.clamp(max=a),
            "scale": a * f,
            "ablate": torch.zeros_like(f),
        }[entry["op"]]
        return (g - f)[:, None] * sae.decoder(entry["index"])

    @staticmethod
    def _vector_delta(entry, layer, h):
        rows = inline_rows(entry["data"])
        v = rows[entry["layers"].index(layer)] if len(rows) > 1 else rows[0]
        op = entry.get("op", "add")
        if op == "add":
            return (entry.get("strength", 1.0) * v).expand_as(h)
        unit = v / v.norm()
        f = h @ unit
        g = {
            "project_out": torch.zeros_like(f),
            "scale_along": entry.get("strength", 1.0) * f,
            "cap": f.clamp(entry.get("min", -float("inf")), entry.get("max", float("inf"))),
        }[op]
        return (g - f)[:, None] * unit
