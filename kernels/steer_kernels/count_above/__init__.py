"""How many features of a whole SAE rank before given ones: membership in TopK, decided by counting.

What steering needs of a TopK SAE is not its k features but whether a few known ones are among them, `ahead < k`, which
needs no selection, no lists and, where no given feature can be on, not even the encoder.
"""

from steer_kernels.count_above.op import count_above
from steer_kernels.count_above.reference import count_above_reference
from steer_kernels.count_above.torch_path import count_above_torch

__all__ = ["count_above", "count_above_reference", "count_above_torch"]
