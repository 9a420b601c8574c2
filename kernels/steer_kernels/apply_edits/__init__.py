"""The one primitive of steering, applied to a batch of tokens at one site.

For a token with stream h at the site and the edit rows j that target it

    h' = h + sum_j s_j * (g_j(f_j) - f_j) * write_j        f_j = act_j(a_j * read_j . x_j + bias_j)

x_j is h, or the token's stream at an earlier site of the same forward; a_j and s_j are 1 but for token norms. Every f
is read from the incoming stream and the deltas are summed, so the order of the rows never matters.
"""

from steer_kernels.apply_edits.edits import SiteEdits, TokenNorm, TopKEncoder
from steer_kernels.apply_edits.op import CapturingSite, Site, apply_edits, bind_sites
from steer_kernels.apply_edits.reference import apply_edits_reference
from steer_kernels.apply_edits.step_table import MAX_RANKED, Ranking, Room, StepTable
from steer_kernels.apply_edits.table_edits import TableEdits
from steer_kernels.apply_edits.torch_path import (
    PreparedEdits,
    RemoteReads,
    apply_prepared,
    compile_for_cpu,
    prepare_edits,
    read_activations,
)

__all__ = [
    "MAX_RANKED",
    "CapturingSite",
    "PreparedEdits",
    "Ranking",
    "RemoteReads",
    "Room",
    "Site",
    "SiteEdits",
    "StepTable",
    "TableEdits",
    "TokenNorm",
    "TopKEncoder",
    "apply_edits",
    "apply_edits_reference",
    "apply_prepared",
    "bind_sites",
    "compile_for_cpu",
    "prepare_edits",
    "read_activations",
]
