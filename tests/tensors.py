"""Inline tensors as clients send them."""

import base64

import numpy as np


def inline(values, dtype="float32"):
    """`values` (array-like, 1 or 2 dimensions) as the `data` object of a vector."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "bfloat16":
        data = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = array.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(data).decode()}
