"""Reconstructions from lists of (feature, activation), as encode_topk and encode_threshold return them.

base + scale * (sum_j f_j * W_dec[j] + b_dec)

reconstruction                b_dec, the token norm's scale, no base
of a skip transcoder          base = x @ W_skip.T, a dense product that torch does best
of a layer_norm SAE           base = mean(x)
splice, error dropped         the same, of edited activations
splice, error kept            base = the stream, values f' - f, no b_dec: it adds dec(f') - dec(f), so what the SAE
                              does not explain stays
"""

from steer_kernels.decode_sparse.op import decode_sparse
from steer_kernels.decode_sparse.reference import decode_sparse_reference
from steer_kernels.decode_sparse.torch_path import decode_sparse_torch

__all__ = ["decode_sparse", "decode_sparse_reference", "decode_sparse_torch"]
