"""Maximum-likelihood training of the energies while a flow learns to propose for them."""

import copy
import enum
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from sk_ebm._folds import Batches, Folds
from sk_ebm._log_normalizer import estimate_log_normalizers
from sk_ebm._model import TiltedEnsemble
from sk_ebm._parallel import ALONE, Group
from sk_ebm._sampler import (
    Chains,
    Pool,
    defensive_proposal,
    draw_pool,
    finite_or_zero_weight,
    start_chains,
)
from sk_ebm._soap import SOAP
from sk_ebm._stacking import gain_by_chance
from sk_ebm._types import Density

Report = Callable[[dict[str, float], Callable[[], tuple[TiltedEnsemble, Density]]], bool]

_FLOW_LEARNING_RATE = 2e-3
# Of the energies: decay of the means of gradients and of their squares, steps in which the rate rises, and the rate of
# matrices as a multiple of that of other parameters, which AdamW could not bear.
_BETAS, _WARM_UP, _WARM_UP_OF_SOAP, _RATE_OF_MATRICES = (0.9, 0.98), 50, 200, 8.0
_DATA_SHARE_OF_FLOW_BATCH = 0.25
_WEIGHT_AVERAGE_DECAY = 0.99
_MAX_GRAD_NORM = 5.0
# Factors by which energies may be scaled down. With few rows they soon promise more than held-out rows keep, and yet go
# on to learn what is true of these: trained on and scaled down, they are better than unscaled and stopped early.
SCALES = (1.0, 0.75, 0.5, 0.25)
# Rows that validation looks at: their noise is far below what patience and stacking react to.
MAX_JUDGED_ROWS = 20_000
_ROUNDS_BEFORE_BACKING_OFF = 4
_MAX_ROUNDS_AT_GATE = 20
# A share of the iterations, and what may still come after it at most, as a share of what has been gained: a base that
# would trail another even so is not worth the rest of them. Where it earned a base a share, it was .2 with AdamW and
# .34 with SOAP, whose rate rises for longer.
_LOOK_AHEAD, _LOOK_AHEAD_WITH_SOAP = (0.25, 0.3), (0.375, 0.5)
# Times `tol`, or what may come by chance, that energies must have gained by the time that a first gain is due: those on
# a base that fits may add a thousandth of a nat soon, and nothing more in all the iterations that they would go on for.
_FIRST_GAIN_OF_TOL, _FIRST_GAIN_OF_CHANCE = 3.0, 1.5


class Outcome(enum.Enum):
    """How training ended, and the sentence the user reads."""

    CONVERGED = "the validation log-likelihood stopped improving"
    MAX_ITER = "max_iter was reached"
    STOPPED = "a callback stopped it"
    INTERRUPTED = "it was interrupted from the keyboard"
    UNTRAINED = "flows and kernels need no energies on top"
    LEFT_BEHIND = "another base was too far ahead to catch up with"
    SAMPLER_TOO_WEAK = "the flow could no longer propose for the energy: the effective sample size stayed too low"
    NON_FINITE = "the loss became non-finite; the last good parameters were kept"


ENDED_BY_USER = (Outcome.STOPPED, Outcome.INTERRUPTED)


@dataclass(frozen=True)
class TrainSettings:
    """Numbers of the loop; the first ones are parameters of EBMFlowDensity."""

    max_iter: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    n_chains: int
    pool_size: int
    global_kernel: str
    n_local_steps: int
    early_stopping: bool
    n_iter_no_change: int
    tol: float
    # Checks within which energies must beat the untilted base clearly, if they ever will.
    n_iter_first_gain: int = 6
    # Whether SOAP fits the energies, not AdamW: with many rows it finds more, with few it over-fits sooner.
    soap: bool = False
    steps_per_iter: int = 16
    n_flow_steps: int = 2
    n_negative: int = 256
    validate_every: int = 5
    min_effective_sample_size: float = 0.02
    # The processes that train together, and how much a row of this one counts, 1 in the mean over processes.
    group: Group = ALONE
    data_share: float = 1.0

    def look_ahead(self) -> tuple[float, float]:
        """Return after which share of the iterations to look ahead, and how much may come then."""
        return _LOOK_AHEAD_WITH_SOAP if self.soap else _LOOK_AHEAD


class TrainResult(NamedTuple):
    """What training leaves behind: everything else was scratch."""

    model: TiltedEnsemble
    flow: Density
    history: list[dict[str, float]]
    n_iter: int
    outcome: Outcome
    held_out_log_likelihood: float
    acceptance_rate: dict[str, float]

    def gain(self) -> float:
        """Return what the energies add to the base that they started from, in nats per held-out row."""
        return self.held_out_log_likelihood - self.history[0]["validation_log_likelihood"]


@dataclass
class Monitor:
    """Keep the history, decide when to stop, and hold the best parameters.

    What may come by chance, in nats per row, is less than `tol` where rows are many.
    """

    settings: TrainSettings
    by_chance: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -math.inf
    best: Any = None
    _start: float | None = None
    _highest: float = -math.inf
    _n_since_start: int = 0
    _bar: float = -math.inf
    _reference: float = -math.inf
    _stale: int = 0
    _uncovered: int = 0

    def record(self, check: dict[str, float], keep: Callable[[], Any]) -> None:
        """Add a validation check; `keep` returns a copy of what to restore if this check is the best."""
        self.history.append(check)
        # Draws that miss mass make log Z too low and the score too high: such a score does not count.
        is_covered = check["effective_sample_size"] >= self.settings.min_effective_sample_size
        if is_covered and self._uncovered == len(self.history) - 1:
            # The first score that counts, whatever stood there before for want of another.
            self.best, self._start, self._bar, self._reference = None, None, -math.inf, -math.inf
        self._uncovered = 0 if is_covered else self._uncovered + 1
        score = check["validation_log_likelihood"] if is_covered or self.best is None else -math.inf
        if score > self._bar or (is_covered and not self.settings.early_stopping):
            # Energies must beat the start clearly: a lead below the noise would move the weights of modes for nothing.
            self._bar = score + (self.settings.tol if self.best is None else 0.0)
            self.best_score, self.best = score, keep()
        self._n_since_start += 1
        if self._start is None:
            self._start, self._highest, self._n_since_start = score, score, 0
        self._highest = max(self._highest, score)
        if score > self._reference + self.settings.tol:
            self._reference, self._stale = score, 0
        else:
            self._stale += 1

    def reason_to_stop(self) -> Outcome | None:
        """Return why to stop, if the score has not improved for so many checks as the settings allow."""
        patience = self.settings.n_iter_no_change
        is_first_gain_due = self._uncovered == 0 and self._n_since_start >= self.settings.n_iter_first_gain
        first_gain = min(_FIRST_GAIN_OF_TOL * self.settings.tol, _FIRST_GAIN_OF_CHANCE * self.by_chance)
        is_vain = is_first_gain_due and self.gain() <= first_gain
        if not self.settings.early_stopping or (self._stale < patience and not is_vain):
            return None
        return Outcome.SAMPLER_TOO_WEAK if self._uncovered >= patience else Outcome.CONVERGED

    def promise(self) -> float:
        """Return the score (nats) that may be reached in the end, as seen from where training looks ahead."""
        return self.best_score + self.settings.tol + self.settings.look_ahead()[1] * self.gain()

    def gain(self) -> float:
        """Return by how much (nats) the highest score beats the first one that counts, clearly or not."""
        return 0.0 if self._start is None else self._highest - self._start


def train(
    model: TiltedEnsemble,
    flow: Density,
    data: Folds,
    settings: TrainSettings,
    generator: torch.Generator,
    report: Report = lambda check, snapshot: False,
    rival_score: float = -math.inf,
) -> TrainResult:
    """Train the energies of `model` and the `flow` in place until a stopping rule fires.

    Parameters
    ----------
    model : TiltedEnsemble
        Energies to train on their bases.
    flow : Density
        Proposal, already fitted to the data.
    data : Folds
        Rows, weights and folds.
    settings : TrainSettings
        Numbers of the loop.
    generator : torch.Generator
        Source of all randomness.
    report : callable
        Called with every validation check, and with what copies the energies and the flow as they are; returns
        whether to stop.
    rival_score : float
        Validation log-likelihood per row (nats) that another base has reached already.
    """
    state = _TrainState(model, flow, data, settings, generator)
    monitor = Monitor(settings, gain_by_chance(state.judged.weight))
    n_iter, rounds_at_gate = 0, 0
    check = state.validate(0)
    group = settings.group
    if not state.base_log_prob.isfinite().all():
        raise ValueError(
            "The base has no density at rows that it was not fitted to. Widen it, so that it is positive everywhere."
        )
    if not math.isfinite(check["validation_log_likelihood"]):
        raise ValueError(
            "The energy is not finite on all rows before training. Check the energy for overflow, or use the default."
        )
    monitor.record(check, state.snapshot)
    # Whatever decides how training goes on is decided in one process, or they would part ways.
    outcome = Outcome.STOPPED if group.from_first(lambda: report(check, state.snapshot)) else None
    if outcome is None and settings.max_iter == 0:
        outcome = Outcome.UNTRAINED
    n_checks_before = int(settings.look_ahead()[0] * settings.max_iter) // settings.validate_every
    looks_ahead_at = max(1, n_checks_before) * settings.validate_every
    try:
        while outcome is None:
            pool = state.propose()
            covered = min(group.gather(state.move_chains(pool)))
            if covered >= settings.min_effective_sample_size:
                rounds_at_gate = 0
                state.energy_steps()
            else:
                rounds_at_gate += 1
                if rounds_at_gate % _ROUNDS_BEFORE_BACKING_OFF == 0:
                    state.back_off(monitor.best[0])
            state.flow_steps()
            n_iter += 1
            if n_iter % settings.validate_every == 0 or n_iter == settings.max_iter:
                check = state.validate(n_iter)
                if not math.isfinite(check["validation_log_likelihood"]):
                    outcome = Outcome.NON_FINITE
                    break
                monitor.record(check, state.snapshot)
                if group.from_first(lambda check=check: report(check, state.snapshot)):  # type: ignore[misc]
                    outcome = Outcome.STOPPED
                    break
            outcome = monitor.reason_to_stop()
            # What gains nothing may end before that, and is left behind all the same.
            looks_ahead = n_iter == looks_ahead_at or (outcome is Outcome.CONVERGED and n_iter < looks_ahead_at)
            if settings.early_stopping and looks_ahead and monitor.promise() < rival_score:
                outcome = Outcome.LEFT_BEHIND
            elif rounds_at_gate >= _MAX_ROUNDS_AT_GATE:
                outcome = Outcome.SAMPLER_TOO_WEAK
            elif outcome is None and n_iter == settings.max_iter:
                outcome = Outcome.MAX_ITER
    except KeyboardInterrupt:
        if group.size > 1:
            # The other processes would wait for this one for ever.
            raise
        outcome = Outcome.INTERRUPTED
    best_model, best_flow = monitor.best
    return TrainResult(
        best_model, best_flow, monitor.history, n_iter, outcome, monitor.best_score, state.acceptance_rate()
    )


class _TrainState:
    """Optimisers, chains and averages of one training run; dies with it."""

    def __init__(
        self,
        model: TiltedEnsemble,
        flow: Density,
        data: Folds,
        settings: TrainSettings,
        generator: torch.Generator,
    ) -> None:
        self.model, self.flow, self.data, self.settings, self.generator = model, flow, data, settings, generator
        self.started = time.perf_counter()
        self.average = model.frozen_copy()
        self.is_trained_on = (data.train_weight() > 0).to(data.rows.dtype)
        self.batches = Batches(data.weight)
        self.judged = data.sample_of_all(MAX_JUDGED_ROWS, settings.group, settings.data_share)
        self.base_log_prob = model.base_log_prob(self.judged.rows)
        self.energy_parameters = [p for p in model.energies.parameters() if p.requires_grad]
        self.energy_optimizer = self._new_energy_optimizer()
        self.flow_optimizer = torch.optim.AdamW(flow.parameters(), lr=_FLOW_LEARNING_RATE, fused=True)
        self.proposal = defensive_proposal(flow, list(model.bases))
        pool = self.propose()
        self.chains = Chains(
            start_chains(model, pool, settings.n_chains, generator),
            global_kernel=settings.global_kernel,
            n_local_steps=settings.n_local_steps,
        )
        self.n_energy_steps = 0
        self.learning_rate = settings.learning_rate
        self.reports: list[torch.Tensor] = []

    def propose(self) -> Pool:
        """Draw a fresh pool."""
        return draw_pool(self.proposal, self.settings.pool_size, self.generator)

    def move_chains(self, pool: Pool) -> float:
        """Move every chain; return the smallest effective sample size of a member on the pool, a fraction."""
        report = self.chains.move(self.model, self.proposal, pool, self.generator)
        self.reports.append(torch.stack((report.local_acceptance, report.global_acceptance)))
        return float(report.effective_sample_size)

    def energy_steps(self) -> None:
        """Take likelihood-gradient steps against the chains, reweighted for how far the energy has moved since."""
        with torch.no_grad():
            energy_at_move = self.model.energy(self.chains.position)
        n_data = self.settings.batch_size
        for _ in range(self.settings.steps_per_iter):
            self._set_learning_rate()
            rows = self.batches.draw(n_data, self.generator)
            n_chains = self.chains.position.shape[1]
            chains = torch.randint(
                n_chains, (self.settings.n_negative,), generator=self.generator, device=self.data.rows.device
            )
            weight = self.is_trained_on[:, rows]
            positive = self.data.rows[rows].expand(len(self.model), -1, -1)
            energy = self.model.energy(torch.cat([positive, self.chains.position[:, chains]], dim=1))
            positive_phase = (weight * energy[:, :n_data]).sum(-1) / weight.sum(-1).clamp(min=1e-12)
            energy_of_chains = energy[:, n_data:]
            drift_weight = (energy_at_move[:, chains] - energy_of_chains.detach()).softmax(-1)
            negative_phase = (drift_weight * energy_of_chains).sum(-1)
            # A small batch may hold no row that a member trains on.
            gap = self.settings.data_share * positive_phase - negative_phase
            loss = (gap * (weight.sum(-1) > 0)).sum()
            _descend(loss, self.energy_optimizer, self.energy_parameters, self.settings.group)
            self._update_average()

    def back_off(self, best: TiltedEnsemble) -> None:
        """Return to the best energies at half the learning rate: the energy ran away from its sampler."""
        for target in (self.model, self.average):
            target.energies.load_state_dict(best.energies.state_dict())
        self.energy_optimizer = self._new_energy_optimizer()
        self.learning_rate /= 2

    def flow_steps(self) -> None:
        """Fit the flow to the chains by forward KL, with some data rows so that it forgets no mode."""
        chains = self.chains.position.flatten(0, 1)
        n_data = max(1, int(_DATA_SHARE_OF_FLOW_BATCH * self.settings.batch_size))
        for _ in range(self.settings.n_flow_steps):
            rows = self.batches.draw(n_data, self.generator)
            picks = torch.randint(
                len(chains),
                (self.settings.batch_size - n_data,),
                generator=self.generator,
                device=chains.device,
            )
            loss = -self.flow.log_prob(torch.cat([chains[picks], self.data.rows[rows]])).mean()
            _descend(loss, self.flow_optimizer, list(self.flow.parameters()), self.settings.group)

    @torch.no_grad()
    def validate(self, iteration: int) -> dict[str, float]:
        """Return held-out and training log-likelihood per row (nats) of the averaged energies."""
        group = self.settings.group
        pool = draw_pool(self.proposal, max(1, 4 * self.settings.pool_size // group.size), self.generator)
        flat_weight = group.cat(pool.base_log_prob(self.average) - pool.log_proposal)
        energy = group.cat(torch.cat([self.average.energy(part.position) for part in pool.split()], dim=-1))
        controls = group.cat(pool.controls)
        return group.from_first(lambda: self._judge(iteration, flat_weight, energy, controls))

    def _judge(
        self, iteration: int, flat_weight: torch.Tensor, energy: torch.Tensor, controls: torch.Tensor
    ) -> dict[str, float]:
        """Judge the energies, scaled down as suits held-out rows, given what makes the weights of the proposals."""
        acceptance = self.acceptance_rate()
        scale = energy.new_tensor(SCALES).reshape(-1, 1, 1)
        log_weight = finite_or_zero_weight(flat_weight - scale * energy)
        estimates = estimate_log_normalizers(log_weight.flatten(0, 1), controls)
        values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
        # Cast first: some devices know no double precision.
        log_normalizer = values.to(energy.dtype).to(energy.device).reshape(len(SCALES), -1)
        log_prob = self.base_log_prob - scale * self.average.energy(self.judged.rows) - log_normalizer.unsqueeze(-1)
        held_out = torch.tensor([self.judged.held_out_mean(of_scale) for of_scale in log_prob], dtype=torch.float64)
        best = int(held_out.nan_to_num(nan=-math.inf).argmax())
        train_weight = self.judged.train_weight()
        return {
            "iteration": iteration,
            "seconds": time.perf_counter() - self.started,
            "train_log_likelihood": float((train_weight * log_prob[best]).sum() / train_weight.sum()),
            "validation_log_likelihood": float(held_out[best]),
            "log_normalizer": float(log_normalizer[best].mean()),
            # Of the energies as they are: they have to be followed by their chains.
            "effective_sample_size": min(e.effective_sample_size for e in estimates[: len(self.average)]),
            "flow_acceptance": acceptance["flow"],
            "local_acceptance": acceptance["local"],
        }

    def snapshot(self) -> tuple[TiltedEnsemble, Density]:
        """Return copies of the averaged energies and the flow."""
        return self.average.frozen_copy(), copy.deepcopy(self.flow).requires_grad_(False)

    def acceptance_rate(self) -> dict[str, float]:
        """Return the mean acceptance rates of the last moves."""
        recent = torch.stack(self.reports[-20:]).mean(0) if self.reports else torch.full((2,), math.nan)
        return {"local": float(recent[0]), "flow": float(recent[1])}

    def _new_energy_optimizer(self) -> torch.optim.AdamW:
        options: dict[str, Any] = {"lr": self.settings.learning_rate, "weight_decay": self.settings.weight_decay}
        if self.settings.soap:
            return SOAP(self.energy_parameters, **options, betas=_BETAS, matrix_factor=_RATE_OF_MATRICES)
        return torch.optim.AdamW(self.energy_parameters, **options, betas=_BETAS, fused=True)

    def _set_learning_rate(self) -> None:
        settings = self.settings
        self.n_energy_steps += 1
        warm_up = min(1.0, self.n_energy_steps / (_WARM_UP_OF_SOAP if settings.soap else _WARM_UP))
        progress = min(1.0, self.n_energy_steps / (settings.max_iter * settings.steps_per_iter))
        rate = self.learning_rate * warm_up * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        for parameters in self.energy_optimizer.param_groups:
            parameters["lr"] = rate * parameters.get("factor", 1.0)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(_WEIGHT_AVERAGE_DECAY, self.n_energy_steps / (self.n_energy_steps + 10))
        average: list[torch.Tensor] = list(self.average.energies.parameters())
        torch._foreach_lerp_(average, list(self.model.energies.parameters()), 1 - decay)


def _descend(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], group: Group = ALONE
) -> None:
    """Take one clipped gradient step, or none where the gradient is not finite; validation then sees what is wrong."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    group.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
    # What gradient scalers tell a fused optimizer; asking the device whether the norm is finite would wait for it.
    optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).to(norm.dtype)  # type: ignore[attr-defined]
    optimizer.step()
