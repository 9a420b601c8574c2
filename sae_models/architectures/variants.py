"""Kinds of SAE that differ in how they are trained or placed, and are another kind at inference."""

from __future__ import annotations

SAME_AT_INFERENCE: dict[str, str] = {
    "layer_group": "relu",
    "feature_choice": "batchtopk",
    "mutual_choice": "batchtopk",
    "end_to_end": "relu",
    "feature_aligned": "relu",
    "specialized": "relu",
}
"""The architecture whose activation function each one has.

Layer Group (Ghilardi et al. 2024, arXiv 2410.21508) is one SAE on several layers: `hook_points` then names them all.
Feature Choice and Mutual Choice (Ayonrinde 2024, arXiv 2411.02124) share out active features over a batch, so outside
of training they need a threshold, as BatchTopK does. End-to-end (Braun et al. 2024, arXiv 2405.12241), Feature Aligned
(Marks et al. 2024, arXiv 2411.01220) and Specialized (Muhamed et al. 2024, arXiv 2411.00743) change the loss.
"""
