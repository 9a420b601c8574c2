"""encode_topk that reads an eight-bit copy of the encoder, and of the encoder itself only what can be among the k.

What is returned is what encode_topk returns for the same tokens, to the bit: see `triton_kernel` for how it is certain,
and `steer_kernels.eight_bit` for the bound that it rests on. The oracle is `encode_topk_reference`.
"""

from steer_kernels.encode_topk_screened.op import encode_topk_screened

__all__ = ["encode_topk_screened"]
