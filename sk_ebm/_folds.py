"""Rows, weights and folds: who trains on which row, who is judged by it, and batches of rows."""

from typing import NamedTuple

import torch

from sk_ebm._parallel import Group


class Folds(NamedTuple):
    """Rows (n, d) with weights (n,) and fold numbers (n,); member k of K never sees the rows of fold k."""

    rows: torch.Tensor
    weight: torch.Tensor
    fold: torch.Tensor
    n_members: int

    def train_weight(self) -> torch.Tensor:
        """Return the training weight of each row for each member, shape (K, n)."""
        return torch.stack([self.weight * (self.fold != k) for k in range(self.n_members)])

    def held_out_weight(self) -> torch.Tensor:
        """Return the validation weight of each row for each member, shape (K, n)."""
        return torch.stack([self.weight * (self.fold == k) for k in range(self.n_members)])

    def held_out_mean(self, log_prob: torch.Tensor) -> float:
        """Return the weighted mean of log_prob (K, n) over the rows that each member has not seen."""
        weight = self.held_out_weight()
        return float((weight * log_prob).sum() / weight.sum())

    def with_rows(self, rows: torch.Tensor) -> "Folds":
        """Return the same folds of other rows."""
        return self._replace(rows=rows)

    def subset(self, n_rows: int) -> "Folds":
        """Return the first rows; folds are random, so these are a random sample."""
        return Folds(self.rows[:n_rows], self.weight[:n_rows], self.fold[:n_rows], self.n_members)

    def sample_of_all(self, n_rows: int, group: Group, share: float) -> "Folds":
        """Return up to `n_rows` rows of all processes together, the same in each; those of this one weigh `share`."""
        mine = self.subset(max(1, n_rows // group.size))
        if group.size == 1:
            return mine
        weight = (share * mine.weight / mine.weight.sum()).cpu()
        parts = group.gather((mine.rows.cpu(), weight, mine.fold.cpu()))
        rows, weight, fold = (torch.cat([part[j] for part in parts]) for j in range(3))
        order, device = mixed_order(len(rows)), self.rows.device
        weight = weight * (len(weight) / weight.sum())
        return Folds(rows[order].to(device), weight[order].to(device), fold[order].to(device), self.n_members)


class Batches:
    """Draws row numbers in proportion to weights (n,), in a time that does not depend on n.

    `torch.multinomial` looks at all weights for every batch, and takes 2^24 of them at most.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows = weight.nonzero().squeeze(-1)
        weight = weight[self.rows]
        self.cumulative = None if bool((weight == weight[0]).all()) else weight.cpu().double().cumsum(0)
        if self.cumulative is not None:
            ends = self.cumulative / self.cumulative[-1]
            # Some devices know no double precision.
            self.cumulative = ends.to(weight.device, torch.float32 if weight.device.type == "mps" else torch.float64)

    def draw(self, n_picked: int, generator: torch.Generator) -> torch.Tensor:
        """Return the numbers of rows drawn with replacement, shape (n_picked,)."""
        if self.cumulative is None:
            picks = torch.randint(len(self.rows), (n_picked,), generator=generator, device=self.rows.device)
        else:
            uniform = torch.rand(n_picked, generator=generator, device=self.rows.device, dtype=self.cumulative.dtype)
            picks = torch.searchsorted(self.cumulative, uniform, right=True).clamp(max=len(self.rows) - 1)
        return self.rows[picks]


def mixed_order(n_rows: int) -> torch.Tensor:
    """Return the order in which rows of several processes are joined, so that the first of them are of all."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
