"""The one primitive of steering, applied to a batch of tokens at one site.

For a token with stream h at the site and the edit rows j that target it

    h' = h + sum_j w_j * s_j * (g_j(f_j) - f_j) * write_j        f_j = act_j(a_j * read_j . x_j + bias_j)

x_j is h, or the token's stream at an earlier site of the same forward; a_j and s_j are 1 but for token norms. w_j is 1,
or where the row goes through a gate, 0 unless the f of rows that write nothing are as that asks. Every f is read from
the incoming stream and the deltas are summed, so the order of the rows never matters.
"""

from steer_kernels.apply_edits.edits import SiteEdits, TokenNorm, TopKEncoder
from steer_kernels.apply_edits.gates import GateReads, Gates
from steer_kernels.apply_edits.op import CapturingSite, ReadsForLater, Site, apply_edits, bind_sites
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
    "GateReads",
    "Gates",
    "PreparedEdits",
    "Ranking",
    "ReadsForLater",
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
