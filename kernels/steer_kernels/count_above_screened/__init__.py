"""TopK membership of given features from an eight-bit copy of the encoder, exact all the same.

What is returned is what count_above returns, but that ranks stop at k: membership among the k first needs no more, and
what is far from them needs nothing but the copy then. See `triton_kernel` for how it is certain, and
`steer_kernels.eight_bit` for the bound that it rests on. The oracle is `count_above_reference`, its counts cut off at
k.
"""

from steer_kernels.count_above_screened.op import count_above_screened

__all__ = ["count_above_screened"]
