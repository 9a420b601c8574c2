"""Which tokens an edit acts on, how blocks of the prefix cache are keyed by it, and how tokens are counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_server.plan import (
    CLOSED,
    OPEN,
    BlockKeys,
    Condition,
    DecoderRow,
    Edit,
    EncoderRow,
    GateRecord,
    Plan,
    Response,
    Target,
    TokenCounts,
    TokenSpans,
    applied_tokens,
    decode_plan,
    encode_plan,
)

BLOCK = 16


def plan_of(*targets, shift=1.0, preserve_norm=False, site="blocks.1.hook_mlp_out", **rest):
    edits = [Edit(site, None, DecoderRow("sae", i), Response(shift=shift), t, **rest) for i, t in enumerate(targets)]
    return Plan.build(edits, {}, preserve_norm)


def keys(plan, prompt_len, blocks=4):
    block_keys = BlockKeys(plan, prompt_len)
    return [block_keys.key(i * BLOCK, (i + 1) * BLOCK) for i in range(blocks)]


def test_generation_leaves_the_prompts_blocks_plain():
    assert keys(plan_of(Target("generation")), 32)[:2] == [None, None]
    assert None not in keys(plan_of(Target("generation")), 32)[2:]
    assert [k is None for k in keys(plan_of(Target("prompt")), 32)] == [False, False, True, True]
    assert None not in keys(plan_of(Target("all")), 32)


def test_skipped_tokens_are_plain():
    assert [k is None for k in keys(plan_of(Target("all", skip_first=16)), 5)] == [True, False, False, False]


def test_whole_blocks_are_shared_between_prompts_of_different_lengths():
    assert keys(plan_of(Target("all")), 20) == keys(plan_of(Target("all")), 50)
    assert keys(plan_of(Target("prompt")), 32)[:2] == keys(plan_of(Target("prompt")), 64)[:2]


def test_a_boundary_inside_of_a_block_is_part_of_its_key():
    ends = [keys(plan_of(Target("prompt")), prompt_len)[1] for prompt_len in range(17, 33)]
    assert len(set(ends)) == 16


@given(
    st.lists(st.tuples(st.sampled_from(["prompt", "generation", "all"]), st.integers(0, 40)), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(["prompt", "generation", "all"]), st.integers(0, 40)), min_size=1, max_size=3),
    st.integers(1, 60),
    st.integers(1, 60),
)
def test_equal_keys_mean_equal_edits_on_every_token(targets_a, targets_b, prompt_a, prompt_b):
    """The property that the cache rests on, from the definition: the edits that act on each token of the block."""
    a, b = plan_of(*(Target(*t) for t in targets_a)), plan_of(*(Target(*t) for t in targets_b))

    def acting(plan, prompt_len, position):
        return {
            (e.write, e.response)
            for e in plan.edits
            if e.target.interval(prompt_len)[0] <= position < e.target.interval(prompt_len)[1]
        }

    for i in range(4):
        positions = range(i * BLOCK, (i + 1) * BLOCK)
        same = all(acting(a, prompt_a, p) == acting(b, prompt_b, p) for p in positions)
        key_a, key_b = keys(a, prompt_a)[i], keys(b, prompt_b)[i]
        if key_a == key_b:
            assert same
        assert (key_a is None) == all(not acting(a, prompt_a, p) for p in positions)


@pytest.mark.parametrize(
    "change",
    [
        {"shift": 2.0},
        {"preserve_norm": True},
        {"site": "blocks.1.hook_attn_out"},
        {"read_site": "blocks.1.mlp.hook_in"},
        {"norm": "layer_norm"},
    ],
)
def test_what_the_edits_do_is_part_of_the_key(change):
    assert keys(plan_of(Target("all")), 8) != keys(plan_of(Target("all"), **change), 8)
    assert plan_of(Target("all")).fingerprint != plan_of(Target("all"), **change).fingerprint


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=8), st.integers(0, 90), st.integers(0, 90))
def test_spans_count_each_position_once(spans, first, end):
    counted = TokenSpans()
    positions = set()
    for start, length in spans:
        counted.add(start, start + length)
        positions.update(range(start, start + length))
    assert counted.count(first, end) == len(positions & set(range(first, end)))
    assert counted.end == max(positions, default=-1) + 1


def test_tokens_and_cached_tokens():
    computed = TokenSpans()
    computed.add(128, 200)
    computed.add(200, 203)
    # A prompt of 200 tokens, 128 of them from the cache, and 4 tokens returned: 3 of those were fed to the model.
    assert applied_tokens(Target("all"), 200, 203, computed) == TokenCounts(75, 0, 128)
    assert applied_tokens(Target("prompt"), 200, 203, computed) == TokenCounts(72, 0, 128)
    assert applied_tokens(Target("generation"), 200, 203, computed) == TokenCounts(3, 0, 0)
    assert applied_tokens(Target("all", skip_first=130), 200, 203, computed) == TokenCounts(73, 0, 0)
    assert applied_tokens(Target("prompt", skip_first=500), 200, 203, computed) == TokenCounts(0, 0, 0)


REPORTS = st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=12)), max_size=8)


@given(REPORTS, st.integers(0, 50), st.integers(0, 50))
def test_what_is_said_last_of_a_position_counts(reports, first, end):
    """Of positions that are computed again, as after a preemption."""
    reports = [(at, bytes(1 + byte % 2 for byte in said)) for at, said in reports]
    gate, computed, truth = GateRecord(), TokenSpans(), {}
    for at, said in reports:
        gate.add(at, said)
        computed.add(at, at + len(said))
        truth |= dict(enumerate(said, at))
    expected = [truth[i] for i in range(first, end) if i in truth]
    assert gate.count(computed.within(first, end)) == (expected.count(OPEN), expected.count(CLOSED))


def test_open_closed_and_cached_tokens():
    computed, gate = TokenSpans(), GateRecord()
    computed.add(4, 10)
    gate.add(4, bytes([OPEN, CLOSED, CLOSED, OPEN, OPEN, OPEN]))
    assert applied_tokens(Target("all"), 8, 10, computed, gate) == TokenCounts(tokens=4, closed=2, cached=4)
    assert applied_tokens(Target("prompt", skip_first=5), 8, 10, computed, gate) == TokenCounts(1, 2, 0)
    # A draft that was rejected lies behind what counts, as does nothing else.
    computed.add(10, 12)
    with pytest.raises(ValueError, match="not evaluated for 2 of the tokens"):
        applied_tokens(Target("all"), 8, 12, computed, gate)


def test_conditions_are_part_of_what_is_asked():
    plain = plan_of(Target("all"))
    conditions = [
        Condition("blocks.1.hook_resid_post", EncoderRow("sae", 1), bound, negated)
        for bound in (0.5, 1.0)
        for negated in (False, True)
    ]
    plans = [Plan.build(list(plain.edits), {}, False, [condition]) for condition in conditions]
    plans.append(Plan.build(list(plain.edits), {}, False, conditions))
    assert len({plan.fingerprint for plan in (plain, *plans)}) == 6
    assert len({tuple(keys(plan, 8)) for plan in (plain, *plans)}) == 6
    again = Plan.build(list(plain.edits), {}, False, [*conditions[::-1], conditions[0]])
    assert again == plans[-1], "the order, and saying it twice, make no difference"
    assert decode_plan(encode_plan(again)) == again
    assert EncoderRow("sae", 1) in again.row_refs()
