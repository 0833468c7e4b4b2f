"""Flows that are bases: how large they are, how long they are fitted, and whether they pay."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from sk_ebm._bases import Bases
from sk_ebm._flow import CouplingFlow
from sk_ebm._folds import Folds
from sk_ebm._parallel import Group
from sk_ebm._selection import HEAVY_TAILED, mix_members, shares_of_parts
from sk_ebm._stacking import gain_by_chance, mean_and_std_error, mixture_shares
from sk_ebm._types import Density

# In fewer features energies learn whatever a flow does.
MIN_FEATURES = 3
# Nats that a flow must add to the best candidate when both are pooled, beyond what chance adds: a base of flows costs
# more than all others together. A small one may count so much of its own gain in advance for a larger one to be tried.
_MIN_LEAD, _GAIN_OF_SIZE = 0.05, 0.25
# Checks without a gain after which a flow that is a base stops.
BASE_FLOW_PATIENCE = 8
_MIN_STEPS, _MAX_STEPS = 500, 8000
# Coupling layers, and the rows from which on there are more.
_LAYERS, _MORE_LAYERS, _ROWS_FOR_MORE_LAYERS = 4, 6, 10_000
# Standard errors of its lead by which a flow must be ahead for sure.
_CLEARLY = 2.0


def base_flow_steps(n_rows: int, n_energy_steps: int) -> int:
    """Return how many steps flows that are bases may take: more rows have more to teach.

    Fewer where energies have fewer than such flows have at least.
    """
    steps = max(_MIN_STEPS, min(n_rows // 2, int(100 * n_rows ** (1 / 3)), _MAX_STEPS))
    return min(steps, steps * n_energy_steps // _MIN_STEPS)


def base_flow_batch_size(batch_size: int) -> int:
    """Return how many rows a gradient step of flows that are bases takes, given those of the flow that proposes."""
    return max(1, batch_size // 2)


def base_flow_layers(n_rows: int) -> int:
    """Return how many coupling layers flows that are bases have: more pay only where rows are many."""
    return _LAYERS if n_rows < _ROWS_FOR_MORE_LAYERS else _MORE_LAYERS


class BaseFlows:
    """Flows, one per member, fitted only as far as they promise to pay.

    Parameters
    ----------
    make_flow : callable
        Makes a flow that is not yet fitted.
    n_flows : int
        How many there are, one per member, or none where flows are no bases.
    small_flow : Density
        The flow that proposes, fitted to the rows of all folds but 0: it tells whether a larger one is worth a try.
    fit : callable
        Called with some of the flows and the fold that each is not to see; fits them.
    bases : mapping of str to Bases
        Other bases by name, "gaussian" among them.
    judged : Folds
        Rows to judge by, in z-space.
    group : Group
        The processes that train together.
    """

    def __init__(
        self,
        make_flow: Callable[[], CouplingFlow],
        n_flows: int,
        small_flow: Density,
        fit: Callable[[list[CouplingFlow], list[int]], None],
        bases: Mapping[str, Bases],
        judged: Folds,
        group: Group,
    ) -> None:
        self.make_flow, self.n_flows, self.small_flow, self.fit = make_flow, n_flows, small_flow, fit
        self.bases, self.judged, self.group = bases, judged, group
        self.fitted: list[CouplingFlow] = []

    def rival_score(self, likeliest: str) -> float:
        """Return the score (nats) that energies must promise, or flows win for sure.

        To know it, the first flow is fitted if the small one pays by itself on top of the likeliest base. If it does so
        for sure, all are: side by side they take less time than one and then the others.
        """
        untrained = {likeliest: 0.0}
        if not self.n_flows:
            return -math.inf
        lead_of_small = self._lead(self.small_flow, untrained)
        if not lead_of_small.is_worth_it():
            return -math.inf
        self._fit_up_to(self.n_flows if lead_of_small.surely_worth_it_up_to() > 0 else 1)
        return self.bases[likeliest].score + self._lead(self.fitted[0], untrained).surely_worth_it_up_to()

    def fit_if_worth_it(self, gains: Mapping[str, float]) -> list[Density]:
        """Fit all if the first adds enough to the best candidate, and mix each with a base: flows know no tails.

        `gains` holds what the energies of each candidate add to its base, in nats per row.
        """
        if not self.fitted:
            if not self.n_flows or not self._lead(self.small_flow, gains, _GAIN_OF_SIZE).is_worth_it():
                return []
            self._fit_up_to(1)
        if not self._lead(self.fitted[0], gains).is_worth_it():
            return []
        heavy_tailed = [copy.deepcopy(base).to(self.judged.rows) for base in self.bases[HEAVY_TAILED].members]
        parts: list[list[Density]] = [self.fit_all(), heavy_tailed]
        # Decided in one process, or rounding might make them part ways.
        return mix_members(parts, self.group.from_first(lambda: shares_of_parts(parts, self.judged)))

    def fit_all(self) -> list[Density]:
        """Fit those that are not fitted yet, and return all."""
        self._fit_up_to(self.n_flows)
        return list(self.fitted)

    def _fit_up_to(self, n_flows: int) -> None:
        folds = list(range(len(self.fitted), n_flows))
        if folds:
            flows = [self.make_flow() for _ in folds]
            self.fit(flows, folds)
            self.fitted += flows

    def _lead(self, flow: Density, gains: Mapping[str, float], gain_of_size: float = 0.0) -> "Lead":
        # Decided in one process, or rounding might make them part ways.
        return self.group.from_first(lambda: lead_of_flow(flow, self.bases, gains, self.judged, gain_of_size))


class Lead(NamedTuple):
    """What a flow adds to the best candidate when both are pooled, in nats per row beyond chance."""

    value: float
    std_error: float

    def is_worth_it(self) -> bool:
        """Return whether it pays for what flows cost; where no row tells, the lead is no number."""
        return self.value >= _MIN_LEAD

    def surely_worth_it_up_to(self) -> float:
        """Return what the candidate may gain (nats per row) while the lead is all but sure to pay."""
        return self.value - _CLEARLY * self.std_error - _MIN_LEAD


@torch.no_grad()
def lead_of_flow(
    flow: Density, bases: Mapping[str, Bases], gains: Mapping[str, float], judged: Folds, gain_of_size: float = 0.0
) -> Lead:
    """Return what a flow that has not seen fold 0 adds to the best candidate on its rows.

    By itself it may be far behind, for a few rows beyond those that it has seen: it knows no tails. Of a candidate, its
    base is measured on the same rows, and what the energies add to it on all, because folds differ by far more than
    candidates do where there are outliers.

    The flow counts `gain_of_size` of its own gain over a Gaussian in advance. `gains` holds what the energies of each
    candidate add to its base, in nats per row.
    """
    is_held_out = (judged.fold == 0) & (judged.weight > 0)
    rows, weight = judged.rows[is_held_out], judged.weight[is_held_out].cpu().double()

    def mean(log_prob: torch.Tensor) -> float:
        return float(weight @ log_prob / weight.sum())

    def log_prob_of(density: Density, rows: torch.Tensor) -> torch.Tensor:
        return density.log_prob(rows).cpu().double().nan_to_num(nan=-math.inf, neginf=-math.inf)

    def of_base(name: str) -> torch.Tensor:
        return log_prob_of(bases[name].members[0], rows.cpu().double())

    of_best = max((of_base(name) + gain for name, gain in gains.items()), key=mean)
    of_flow = log_prob_of(flow, rows)
    own_gain = max(0.0, mean(of_flow) - mean(of_base("gaussian")))
    both = torch.stack([of_flow + gain_of_size * own_gain, of_best])
    added = (both + mixture_shares(both, weight).log().unsqueeze(-1)).logsumexp(0) - of_best
    value, std_error = mean_and_std_error(added, weight)
    return Lead(value - gain_by_chance(weight), std_error)
