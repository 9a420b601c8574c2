"""The one primitive of steering, applied to a batch of tokens at one site.

For a token with residual stream h and the edit rows j that target it

    h' = h + sum_j (g_j(f_j) - f_j) * write_j        f_j = act_j(read_j . h + bias_j)

Every f is read from the incoming h and the deltas are summed, so the order of the rows never matters.
"""

from steer_kernels.apply_edits.edits import SiteEdits, TopKEncoder
from steer_kernels.apply_edits.op import CapturingSite, Site, apply_edits, bind_sites
from steer_kernels.apply_edits.reference import apply_edits_reference
from steer_kernels.apply_edits.torch_path import PreparedEdits, apply_prepared, prepare_edits, read_activations

__all__ = [
    "CapturingSite",
    "PreparedEdits",
    "Site",
    "SiteEdits",
    "TopKEncoder",
    "apply_edits",
    "apply_edits_reference",
    "apply_prepared",
    "bind_sites",
    "prepare_edits",
    "read_activations",
]
