"""Rows, weights and folds: who trains on which row, and who is judged by it."""

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


def mixed_order(n_rows: int) -> torch.Tensor:
    """Return the order in which rows of several processes are joined, so that the first of them are of all."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
