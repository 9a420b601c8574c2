"""The k first-ranked features of each token over a whole SAE, and their pre-activations: TopK and AbsTopK.

Exact: what is returned are the k first of p as the kernel adds it up, `steer_kernels.pre_activations` has the formula
and the order. On a GPU p of all features is never written anywhere, see `triton_kernel`.
"""

from steer_kernels.encode_topk.op import encode_topk
from steer_kernels.encode_topk.reference import encode_topk_reference
from steer_kernels.encode_topk.torch_path import encode_topk_torch

__all__ = ["encode_topk", "encode_topk_reference", "encode_topk_torch"]
