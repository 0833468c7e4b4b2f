"""Bases of the members, each fitted to the rows that its member may see and judged by those that it may not."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sk_ebm._folds import Folds
from sk_ebm._types import Density


class Bases(NamedTuple):
    """One fitted base per member, and the held-out log-likelihood per row (nats, in z-space)."""

    members: list[Density]
    score: float


def cross_fit(fit: Callable[[torch.Tensor, torch.Tensor], Sequence[Density]], data: Folds) -> Bases:
    """Fit one density per member on the rows it may see, and score each on the rows it may not."""
    members = list(fit(data.rows, data.train_weight()))
    return Bases(members, data.held_out_mean(member_log_prob(members, data.rows)))


def member_log_prob(members: Sequence[Density], rows: torch.Tensor) -> torch.Tensor:
    """Return the log density (nats) of each row under each member, shape (K, n)."""
    return torch.stack([member.log_prob(rows) for member in members])


def held_out_log_prob(members: Sequence[Density], data: Folds) -> torch.Tensor:
    """Return the log density (nats) of each row under the member that has not seen it, or the last if all have."""
    log_prob = data.rows.new_empty(len(data.rows))
    for k, member in enumerate(members):
        rows = data.fold.clamp(max=data.n_members - 1) == k
        log_prob[rows] = member.log_prob(data.rows[rows])
    return log_prob
