"""The features of a whole SAE whose pre-activation exceeds their own threshold, as lists of fixed length.

    ReLU          threshold 0
    JumpReLU      its own thresholds (Rajamanoharan et al. 2024)
    BatchTopK     the one threshold that training calibrated (Bussmann et al. 2024)
    Gated         the gate is open where p > max(0, b_mag - exp(r_mag) * b_gate), p being the magnitude's pre-activation
                  (Rajamanoharan et al. 2024: gate and magnitude share their rows up to exp(r_mag))

Exact and in ascending order; a list that was too short is told by its count and never passes for whole.
"""

from steer_kernels.encode_threshold.op import encode_threshold, encode_threshold_all
from steer_kernels.encode_threshold.reference import encode_threshold_reference
from steer_kernels.encode_threshold.torch_path import encode_threshold_torch

__all__ = ["encode_threshold", "encode_threshold_all", "encode_threshold_reference", "encode_threshold_torch"]
