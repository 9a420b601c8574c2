"""Where the words of a step table's record are, as Triton's kernels name them."""

from __future__ import annotations

import triton.language as tl

from steer_kernels.apply_edits import step_table
from steer_kernels.apply_edits.step_table import INTEGERS

WORDS = tl.constexpr(step_table.WORDS)
START = tl.constexpr(INTEGERS.index("start"))
STOP = tl.constexpr(INTEGERS.index("stop"))
READ = tl.constexpr(INTEGERS.index("read"))
WRITE = tl.constexpr(INTEGERS.index("write"))
NORM = tl.constexpr(INTEGERS.index("norm"))
PRESERVE_NORM = tl.constexpr(INTEGERS.index("preserve_norm"))
ENCODER = tl.constexpr(INTEGERS.index("encoder"))
FEATURE = tl.constexpr(INTEGERS.index("feature"))
FLOATS = tl.constexpr(len(INTEGERS))
READ_ORDER = tl.constexpr(step_table.READ_ORDER)
GATE = tl.constexpr(step_table.GATE)
GATE_COUNT = tl.constexpr(step_table.GATE_COUNT)
