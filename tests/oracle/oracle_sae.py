"""SAEs by the definitions of the libraries that publish them, in fp64 and straight from the files.

Independent of the code under test: nothing of steer_server, sae_models or steer_kernels is used here.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open


class OracleSAE:
    """A folder in SAELens' format, its activations by the definitions of SAELens' `encode` methods, or of the papers
    for what SAELens does not have."""

    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "cfg.json").read_text())
        with safe_open(Path(folder) / "sae_weights.safetensors", framework="pt") as file:
            self.w = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        metadata = self.config["metadata"]
        self.sites = metadata.get("hook_names") or [metadata["hook_name"]]
        self.sites_out = metadata.get("hook_names_out") or [metadata.get("hook_name_out") or self.sites[0]]
        if len(self.sites_out) < len(self.sites):
            self.sites_out = self.sites
        self.layer = int(self.sites[0].split(".")[1])
        self.skip_first = metadata.get("steer_server", {}).get("skip_first", 0)
        self.architecture = self.config["architecture"]
        self.rescaled = self.config.get("rescale_acts_by_decoder_norm", False)

    def normalised(self, x):
        """(what the encoder is given of x [tokens, d_in], what the decoder's output is multiplied by [tokens, 1])."""
        x = x.double()
        norm = self.config.get("normalize_activations", "none")
        if norm == "layer_norm":
            centred = x - x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return centred / (std + 1e-5), std
        if norm == "constant_norm_rescale":
            coefficient = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * coefficient, 1 / coefficient
        return x, torch.ones_like(x[:, :1])

    def encode(self, x):
        """[tokens, d_sae] activations of x [tokens, d_in]."""
        w, architecture, k = self.w, self.architecture, self.config.get("k")
        sae_in, _ = self.normalised(x)
        if self.config.get("apply_b_dec_to_input", True) and not self.writes_elsewhere:
            sae_in = sae_in - w["b_dec"]
        pre = sae_in @ w["W_enc"]
        if architecture == "gated":
            return (pre + w["b_gate"] > 0) * (pre * w["r_mag"].exp() + w["b_mag"]).relu()
        pre = pre + w["b_enc"]
        if self.rescaled:
            pre = pre * w["W_dec"].norm(dim=-1)
        if "jumprelu" in architecture:
            return pre.relu() * (pre > w["threshold"])
        if architecture == "abstopk":
            return pre * top(pre.abs(), k)
        if architecture == "groupmax":
            groups = pre.relu().reshape(len(pre), k, -1)
            return (groups * top(groups, 1)).reshape(pre.shape)
        if architecture == "switch":
            experts = pre.reshape(len(pre), self.config["experts"], -1)
            routes = (x.double() @ w["W_router"] + w["b_router"]).softmax(-1)
            chosen = routes * top(routes, 1)
            return ((experts * top(experts, k)).relu() * chosen.unsqueeze(-1)).reshape(pre.shape)
        if "topk" in architecture:
            return (pre * top(pre, k)).relu()
        return pre.relu()

    def write(self, feature, x):
        """[tokens, d_out]: what a unit of the feature's activation writes where x [tokens, d_in] is read."""
        row = self.w["W_dec"][feature]
        _, scale = self.normalised(x)
        return scale * (row / row.norm() if self.rescaled else row)

    @property
    def writes_elsewhere(self):
        return "transcoder" in self.architecture


def top(values, k):
    """1 at the k largest of the last dimension, 0 elsewhere."""
    return torch.zeros_like(values).scatter(-1, values.topk(k, dim=-1).indices, 1.0)
