"""What the kernels are measured against, in plain torch; torch.compile takes the same functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def eager_edit(h: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """Rows gathered beforehand, one a token, as ours are."""
    f = torch.einsum("td,td->t", h, read).relu()
    return h.add_((4.0 - f).unsqueeze(-1) * write)


def eager_edits(h: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """Rows [tokens, n, d_in] gathered beforehand, as ours are."""
    f = torch.einsum("td,tnd->tn", h, read).relu()
    return h.add_(torch.einsum("tn,tnd->td", 4.0 - f, write))


def eager_prompt(h: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """Rows [n, d_in], which all tokens share."""
    return h.addmm_(4.0 - (h @ read.T).relu(), write)


def eager_topk(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(x, W, b.to(x.dtype)).topk(k)


def eager_threshold(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Dense activations: lists would only make it slower."""
    pre_acts = F.linear(x, W, b.to(x.dtype))
    return torch.where(pre_acts > threshold, pre_acts, 0.0)


def eager_count(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    pre_acts = F.linear(x, W, b.to(x.dtype))
    return torch.stack(
        [(pre_acts > pre_acts.gather(1, given[:, i : i + 1])).sum(-1) for i in range(given.shape[1])], dim=1
    )


def eager_decode(features: torch.Tensor, values: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tn,tnd->td", values.to(W.dtype), W[features]) + b


class Frozen(torch.nn.Module):
    """A baseline whose tensors, all but the tokens, are constants that Inductor may repack."""

    def __init__(self, function: Callable[..., Any], constants: tuple[Any, ...]) -> None:
        super().__init__()
        self.function = function
        self.others = [c for c in constants if not isinstance(c, torch.Tensor)]
        self.constants = torch.nn.ParameterList(
            torch.nn.Parameter(c, requires_grad=False) for c in constants if isinstance(c, torch.Tensor)
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.constants, *self.others)
