"""Plans that replace the stream at an SAE's layer, by its reconstruction or by zeros.

Both are edit rows. Projecting out every basis vector e_j leaves zero; a feature edit of op `scale` by 2 adds
(2f - f) * W_dec, and one vector adds b_dec. All rows read the incoming stream, so their sum is the reconstruction.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from sae_models import SAE
from steer_server.plan import DecoderRow, Edit, EncoderRow, Entry, InlineRow, Plan, Resolved, Response, Target


def edits_of_splice(sae: SAE) -> int:
    """Edit rows of `reconstruction(sae)`."""
    return sae.d_in + sae.d_sae + 1


def zero_ablation(sae: SAE) -> Resolved:
    """The stream is zero from the SAE's first token on."""
    rows: dict[str, bytes] = {}
    return _resolved(sae, "zero ablation", _erasure(sae, rows), rows)


def reconstruction(sae: SAE) -> Resolved:
    """The stream is f @ W_dec + b_dec from the SAE's first token on."""
    rows: dict[str, bytes] = {}
    edits = _erasure(sae, rows)
    site, target = str(sae.hook_point), Target(skip_first=sae.skip_first)
    edits += [
        Edit(site, EncoderRow(sae.sha256, i), DecoderRow(sae.sha256, i), Response(scale=2.0), target)
        for i in range(sae.d_sae)
    ]
    bias = _inline(sae.reconstruction_bias().numpy(), rows)
    edits.append(Edit(site, None, bias, Response(shift=1.0), target))
    return _resolved(sae, "reconstruction", edits, rows)


def _erasure(sae: SAE, rows: dict[str, bytes]) -> list[Edit]:
    target = Target(skip_first=sae.skip_first)
    basis = [_inline(e, rows) for e in np.eye(sae.d_in, dtype=np.float32)]
    return [Edit(str(sae.hook_point), e, e, Response(scale=0.0), target) for e in basis]


def _inline(row: npt.NDArray[np.float32], rows: dict[str, bytes]) -> InlineRow:
    data = row.tobytes()
    digest = hashlib.sha256(data).hexdigest()
    rows[digest] = data
    return InlineRow(digest)


def _resolved(sae: SAE, source: str, edits: list[Edit], rows: dict[str, bytes]) -> Resolved:
    entry = Entry(f"{source} {sae.name}", "set", (sae.hook_point.layer,), Target(skip_first=sae.skip_first))
    return Resolved(Plan.build(edits, rows, preserve_norm=False), (entry,), ())
