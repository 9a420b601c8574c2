"""Steering by Hugging Face transformers and forward hooks, in fp32, straight from the request's JSON.

Independent of the code under test: nothing of steer_server, sae_models or steer_kernels is used here.
"""

import base64

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.oracle.hf_sites import hook
from tests.oracle.oracle_sae import OracleSAE


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
        self.held = None
        """[tokens] where all conditions held, in the last run that had any."""

    @torch.inference_mode()
    def logprobs(self, tokens, prompt_len, spec=None):
        """[len(tokens), vocab] log-probabilities of each next token; positions past prompt_len are generated."""
        handles = self._hooks(len(tokens), prompt_len, spec or {})
        try:
            logits = self.model(torch.tensor([tokens])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.float().log_softmax(-1)

    def residual(self, tokens, layer):
        """[len(tokens), d_model]: the stream after `layer`, unsteered."""
        return self.stream(tokens, f"blocks.{layer}.hook_resid_post")

    @torch.inference_mode()
    def stream(self, tokens, site):
        """[len(tokens), d_model]: the stream at a hook point, unsteered."""
        seen = []
        handle = hook(self.model, site, lambda h: seen.append(h.clone()))
        try:
            self.model(torch.tensor([tokens]))
        finally:
            handle.remove()
        return seen[0]

    def _hooks(self, length, prompt_len, spec):
        """Hooks that read and edit every site which the spec is about."""
        # By the site that is written: (entry, mask, site that is read).
        edits = {}
        for entry in spec.get("features", []):
            sae = self.saes[entry["sae"]]
            for read, written in zip(sae.sites, sae.sites_out, strict=True):
                edits.setdefault(written, []).append((entry, self._mask(entry, spec, length, prompt_len), read))
        for entry in spec.get("vectors", []):
            for layer in entry["layers"]:
                site = f"blocks.{layer}.hook_resid_post"
                edits.setdefault(site, []).append((entry, self._mask(entry, spec, length, prompt_len), site))
        incoming = {}
        asked = {self.saes[condition["feature"]["sae"]].sites[0] for condition in spec.get("when", [])}
        sites = asked | {site for written, rows in edits.items() for site in (written, *(read for _, _, read in rows))}

        def edit_at(site):
            def edit(stream):
                h = incoming[site] = stream.double()
                return self._edited(h, site, edits[site], incoming, spec) if site in edits else None

            return edit

        return [hook(self.model, site, edit_at(site)) for site in sites]

    def _held(self, incoming, spec):
        held = torch.ones(len(next(iter(incoming.values()))), dtype=torch.bool)
        compare = {">": torch.gt, ">=": torch.ge, "<": torch.lt, "<=": torch.le}
        for condition in spec["when"]:
            sae = self.saes[condition["feature"]["sae"]]
            f = sae.encode(incoming[sae.sites[0]])[:, condition["feature"]["index"]]
            held &= compare[condition["op"]](f, condition["value"])
        return held

    def _edited(self, h, site, rows, incoming, spec):
        delta = torch.zeros_like(h)
        if spec.get("when"):
            self.held = self._held(incoming, spec)
            rows = [(entry, mask & self.held, read) for entry, mask, read in rows]
        for entry, mask, read in rows:
            if "sae" in entry:
                change = self._feature_delta(entry, incoming[read])
            else:
                change = self._vector_delta(entry, int(site.split(".")[1]), h)
            delta += torch.where(mask[:, None], change, 0.0)
        edited = h + delta
        if spec.get("apply", {}).get("preserve_norm"):
            scale = h.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True)
            touched = torch.stack([mask for _, mask, _ in rows]).any(0)
            edited = torch.where(touched[:, None], edited * scale, edited)
        return edited

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

    def _feature_delta(self, entry, x):
        sae = self.saes[entry["sae"]]
        f = sae.encode(x)[:, entry["index"]]
        a = entry.get("value", 0.0)
        g = {
            "set": torch.full_like(f, a),
            "add": f + a,
            "min": f.clamp(min=a),
            "max": f.clamp(max=a),
            "scale": a * f,
            "ablate": torch.zeros_like(f),
        }[entry["op"]]
        return (g - f)[:, None] * sae.write(entry["index"], x)

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
