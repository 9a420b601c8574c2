"""apply_edits in a CUDA graph: captured once with nothing to do, right for every table that is filled afterwards."""

import numpy as np
import torch

from steer_kernels.apply_edits.edits import TokenNorm, TopKEncoder
from steer_kernels.apply_edits.reference import apply_edits_reference
from steer_kernels.apply_edits.step_table import Ranking, Room, StepTable
from tests.kernels.edit_cases import build_edits, encoder_on, token_groups
from tests.launch_recorder import captured

SITES, TOKENS, D_MODEL = 3, 6, 40
RANKED_AT = 1


def edits_of(records):
    return build_edits([{name: value for name, value in record.items() if name != "site"} for record in records])


def test_one_capture_serves_every_table(triton_device):
    from steer_kernels.apply_edits.triton_kernel import apply_table

    torch.manual_seed(0)
    encoder = TopKEncoder(torch.randn(D_MODEL, 48), torch.randn(48) * 0.1, 4, floor=0.0)
    rows = torch.cat([encoder.W_enc.T, torch.randn(8, D_MODEL)])
    room = Room(tokens=16, groups=4, edits=12, edits_a_group=5)
    table = StepTable(rows.to(triton_device), SITES, [encoder_on(encoder, triton_device)], room)
    hidden = torch.zeros(SITES, TOKENS, D_MODEL, device=triton_device)
    residual = torch.zeros_like(hidden)

    def forward():
        for site in range(SITES):
            apply_table(hidden[site], residual[site], table, site)

    table.any_launch({RANKED_AT: [Ranking(0, 0, TokenNorm.NONE)]})
    graph = captured(forward, triton_device)
    assert table.edited.tolist() == [0] * SITES
    held = table.nbytes

    def token(i, site, **record):
        return dict(start=i, stop=i + 1, site=site) | record

    def ranked(i, feature, **record):
        bias = float(encoder.b_enc[feature])
        return token(i, RANKED_AT, read=feature, encoder=0, feature=feature, bias=bias, threshold=0.0, **record)

    steps = [
        [token(0, 0, read=-1, write=50, shift=2.0, scale=1.0)],
        [ranked(i, f, write=48 + f % 8, scale=3.0) for i in range(3) for f in (1, 7, 30, 45)],
        [],
        [
            token(2, 0, read=49, write=50, scale=0.0),
            token(2, 2, read=3, write=51, scale=2.0, source=0, norm=TokenNorm.CONSTANT_NORM),
            token(2, 1, read=4, write=52, low=1.0, scale=1.0, preserve_norm=True),
            token(5, 2, read=5, write=53, threshold=0.0, scale=0.5, norm=TokenNorm.LAYER_NORM),
            ranked(5, 11, write=54, shift=1.5),
        ],
        [token(i, 2, read=-1, write=55, shift=1.0, scale=1.0) for i in range(4)],
        [],
    ]
    for records in steps:
        streams = torch.randn(2, SITES, TOKENS, D_MODEL)
        hidden.copy_(streams[0])
        residual.copy_(streams[1])
        before = table.edited.clone()
        if records:
            edits = edits_of(records)
            sites = np.array([record["site"] for record in records])
            table.fill(edits, sites, token_groups(edits))
        else:
            table.clear()
        graph.replay()
        edited = (table.edited - before).tolist()
        for site in range(SITES):
            here = [r for r in records if r["site"] == site]
            expected = streams[0, site].double()
            if here:
                expected = apply_edits_reference(
                    *streams[:, site], rows, edits_of(here), [encoder], {0: streams[:, 0].sum(0)}
                )
            assert torch.allclose(hidden[site].cpu().double(), expected, atol=1e-4)
            assert edited[site] == len({r["start"] for r in here})
    assert table.nbytes == held
