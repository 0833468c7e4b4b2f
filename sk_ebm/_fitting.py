"""Fit the whole model: feature map, bases, flow, energies on every candidate base, and their pool."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from sk_ebm._base_flows import (
    BASE_FLOW_PATIENCE,
    MIN_FEATURES,
    BaseFlows,
    base_flow_batch_size,
    base_flow_layers,
    base_flow_steps,
)
from sk_ebm._bases import Bases
from sk_ebm._bounds import BoundsMap
from sk_ebm._energy import WhitenedEnergies
from sk_ebm._flow import CouplingFlow
from sk_ebm._flow_fitting import fit_flows
from sk_ebm._folds import Folds, mixed_order
from sk_ebm._kernel_density import MAX_ROWS_OF_KERNELS
from sk_ebm._log_normalizer import (
    LogNormalizer,
    effective_sample_size,
    estimate_log_normalizer,
    estimate_log_normalizers,
)
from sk_ebm._mixture import Mixture, fit_gaussian
from sk_ebm._model import StackedDensity, TiltedEnsemble
from sk_ebm._sampler import (
    Pool,
    defensive_proposal,
    draw_pool,
    log_weight,
    pool_log_weight,
)
from sk_ebm._selection import (
    HEAVY_TAILED,
    KERNELS,
    FitBase,
    choose_feature_map,
    cross_fit_bases,
    cross_fit_kernels_and_tails,
    max_fit_rows,
    name_of,
)
from sk_ebm._stacking import DensityMixture, gain_by_chance, stacking_shares
from sk_ebm._support import FeatureMap, fit_feature_map
from sk_ebm._training import (
    ENDED_BY_USER,
    MAX_JUDGED_ROWS,
    SCALES,
    Outcome,
    TrainResult,
    TrainSettings,
    train,
)
from sk_ebm._types import Density

# Steps and patience (checks) of the flow that proposes.
_FLOW_STEPS, _FLOW_PATIENCE = 300, 4
# What to fit before energies are trained; the Gaussian is what others are measured by.
_KINDS: dict[str, tuple[str, ...]] = {
    "auto": ("gaussian", HEAVY_TAILED),
    "gaussian": ("gaussian",),
    "student_t": ("gaussian", "student_t"),
    "mixture": ("gaussian", "mixture"),
    HEAVY_TAILED: ("gaussian", HEAVY_TAILED),
    "flow": ("gaussian",),
}
_STACKING_DRAWS = 20_000
# Kernels take long to score, and what they add to single energies is more than they add to the average of these.
_MIN_GAIN_OF_KERNELS = 0.05
_SCALES = (*SCALES, 0.0)
_CHUNK = 8192
_MIN_DRAWS = 2 * _CHUNK
_MAX_DRAWS = 32 * _CHUNK
_RNG_LOCK = Lock()


@dataclass(frozen=True)
class FitSettings:
    """What `fit_model` needs beyond the numbers of the training loop."""

    base: str | FitBase
    feature_map: str
    bounds: BoundsMap | None
    make_energies: Callable[[int, int], nn.Module]
    make_flow: Callable[..., CouplingFlow]
    device: torch.device
    # Called with what is done where that takes long and no validation check tells.
    announce: Callable[[str], None]
    train: TrainSettings


class Candidate(NamedTuple):
    """Energies trained on one kind of base, with the flow that proposed for them."""

    name: str
    model: TiltedEnsemble
    flow: Density
    result: TrainResult


class FittedModel(NamedTuple):
    """All that is kept of a fit; modules are float64 on the CPU."""

    feature_map: FeatureMap
    candidates: list[Candidate]
    shares: dict[str, float]
    scores: dict[str, float]
    endings: dict[str, tuple[Outcome, int]]
    model: StackedDensity
    proposal: DensityMixture
    log_normalizer: LogNormalizer


# Called with the name of the base, a validation check, and what builds a model of that base alone with its energies as
# they are now; returns whether to stop.
Report = Callable[[str, dict[str, float], Callable[[], FittedModel]], bool]


def fit_model(
    data: Folds,
    settings: FitSettings,
    generator: torch.Generator,
    report: Report,
    previous: FittedModel | None = None,
) -> tuple[FittedModel, torch.Tensor]:
    """Fit everything to rows in the user's units and return it ready for scoring and sampling.

    Also return the log density (nats, in the user's units) of each row under the members that have not seen it.

    With a previous fit, its feature map, bases, energies and flows are where training goes on from.
    """
    group, share = settings.train.group, settings.train.data_share
    if previous is None:
        fit_rows = data.sample_of_all(max_fit_rows(data.rows.shape[1]), group, share)
        feature_map, bases = group.from_first(lambda: _feature_map_and_bases(fit_rows, settings, generator))
    else:
        feature_map, bases = previous.feature_map, {}
    # The first process alone has drawn numbers for that.
    generator.set_state(group.from_first(generator.get_state))
    z, log_det_rows = _to_z(data, feature_map)
    log_det = sum(group.gather(share * float(data.weight @ log_det_rows / data.weight.sum()))) / group.size
    n_rows = sum(group.gather(len(data.rows)))
    std_error = _worthwhile_std_error(n_rows)

    def report_check(name: str, check: dict[str, float], now: Callable[[], Candidate]) -> bool:
        def model_now() -> FittedModel:
            # A generator of its own: to look at the model must not change how training goes on.
            own_generator = torch.Generator().manual_seed(0)
            return _assemble(feature_map, [now()], {name: 1.0}, log_det, own_generator, std_error)

        return report(name, check, model_now)

    trainer = _Trainer(z, settings, generator, report_check, log_det, n_rows)
    if previous is None:
        trained = trainer.train_candidates(bases)
    else:
        trained = trainer.train_on(previous.candidates)
    candidates = [c for c in trained if c.result.outcome is not Outcome.LEFT_BEHIND]
    if all(c.name == KERNELS for c in candidates):
        # Flows that left all others behind are nearly sure to be there in the end, but not quite.
        candidates = trained
    left_behind = [c for c in trained if c.name not in {candidate.name for candidate in candidates}]
    candidates = trainer.temper(candidates)
    held_out, is_covered = trainer.held_out_log_prob(candidates)
    of_judged, judged = trainer.of_judged(held_out), trainer.judged.weight.cpu().double()
    # What is of no use seldom adds more than chance does.
    tol = min(settings.train.tol, gain_by_chance(judged[of_judged.isfinite().all(0)]))
    least_gain = [_least_gain(candidate, tol) for candidate in candidates]
    shares = group.from_first(lambda: stacking_shares(of_judged, judged, is_covered, least_gain))
    share_of = {c.name: 0.0 for c in trained} | {c.name: share for c, share in zip(candidates, shares, strict=True)}
    candidates = [*candidates, *left_behind]
    fitted = group.from_first(lambda: _assemble(feature_map, candidates, share_of, log_det, generator, std_error))
    log_shares = torch.tensor(shares, dtype=torch.float64).log().unsqueeze(-1)
    return fitted, (log_shares + held_out).logsumexp(0) + log_det_rows


def _least_gain(candidate: Candidate, tol: float) -> float:
    """Return the nats per row that a candidate must add to a pool to join it, -inf where any share is welcome."""
    if candidate.name == HEAVY_TAILED and candidate.model.is_flat:
        # Heavy tails alone cost little, and one row in a thousand may need them.
        return -math.inf
    return _MIN_GAIN_OF_KERNELS if candidate.name == KERNELS else tol


def _assemble(
    feature_map: FeatureMap,
    candidates: list[Candidate],
    share_of: dict[str, float],
    log_det: float,
    generator: torch.Generator,
    std_error: float,
) -> FittedModel:
    """Stack the candidates that have a share, and normalise the whole."""
    kept = _to_float64([candidate for candidate in candidates if share_of[candidate.name] > 0])
    shares = [share_of[candidate.name] for candidate in kept]
    proposal = _joint_proposal(kept, shares)
    model, normalizer = _stack(kept, shares, proposal, generator, std_error)
    scores = {candidate.name: candidate.result.held_out_log_likelihood + log_det for candidate in candidates}
    endings = {candidate.name: (candidate.result.outcome, candidate.result.n_iter) for candidate in candidates}
    return FittedModel(feature_map, kept, share_of, scores, endings, model, proposal, normalizer)


@torch.no_grad()
def estimate_log_normalizer_of(
    density: StackedDensity, proposal: DensityMixture, generator: torch.Generator, *, std_error: float
) -> LogNormalizer:
    """Estimate log Z by importance sampling, with as many draws as `std_error` (nats) asks for, up to a limit."""
    if all(ensemble.is_flat for ensemble in density.ensembles):
        # A mixture of bases is normalised.
        return LogNormalizer(0.0, 0.0, 1.0)
    log_weights: list[torch.Tensor] = []
    controls: list[torch.Tensor] = []
    for n_draws in range(_CHUNK, _MAX_DRAWS + 1, _CHUNK):
        pool = draw_pool(proposal, _CHUNK, generator)
        log_weights.append(log_weight(density, pool))
        controls.append(pool.controls)
        estimate = estimate_log_normalizer(torch.cat(log_weights), torch.cat(controls, dim=-1))
        if n_draws >= _MIN_DRAWS and estimate.std_error < std_error:
            break
    return estimate


def _worthwhile_std_error(n_rows: int) -> float:
    """Return an error of log Z (nats) that is small against what n rows say about the log-likelihood, 1 / sqrt(n)."""
    return min(0.01, max(0.001, 0.15 / math.sqrt(n_rows)))


@contextmanager
def seeded_modules(generator: torch.Generator) -> Iterator[None]:
    """Make the initial values of new modules depend on `generator` alone, and leave torch's global state as it was."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with _RNG_LOCK:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


class _Trainer:
    """Trains candidates one after another on the same rows in z-space."""

    def __init__(
        self,
        data: Folds,
        settings: FitSettings,
        generator: torch.Generator,
        report: Callable[[str, dict[str, float], Callable[[], Candidate]], bool],
        log_det: float,
        n_rows: int,
    ) -> None:
        self.settings, self.generator, self.report, self.log_det = settings, generator, report, log_det
        # Those of all processes.
        self.n_rows = n_rows
        self.n_energy_steps = settings.train.max_iter * settings.train.steps_per_iter
        self.data = Folds(
            data.rows.to(settings.device, torch.float32),
            data.weight.to(settings.device, torch.float32),
            data.fold.to(settings.device),
            data.n_members,
        )
        self.group = settings.train.group
        self.judged = self.data.sample_of_all(MAX_JUDGED_ROWS, self.group, settings.train.data_share)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        # What processes that train together draw apart, and what they draw in common.
        self.device_generator = torch.Generator(settings.device).manual_seed(seed + self.group.rank)
        self.common_generator = torch.Generator(settings.device).manual_seed(seed + self.group.size)

    def train_candidates(self, bases: dict[str, Bases]) -> list[Candidate]:
        """Train energies on each base, and on a base of flows when `base` asks for one or it promises to win."""
        flow = self._make_flow()
        batch_size = self.settings.train.batch_size
        self._fit_flows([flow], [0], min(_FLOW_STEPS, self.n_energy_steps), batch_size, _FLOW_PATIENCE)
        candidates: list[Candidate] = []
        # Kernels leave nothing for energies to learn: every row they are trained on is as likely as it can be.
        kernels = bases.pop(KERNELS, None)
        asked, likeliest = name_of(self.settings.base), max(bases, key=lambda name: bases[name].score)
        base_flows = self._make_base_flows(flow, bases)
        rival_score = base_flows.rival_score(likeliest) if asked == "auto" else -math.inf
        # What fits best first, so that the others have something to catch up with.
        for name in {"auto": dict.fromkeys((likeliest, "gaussian")), "flow": ()}.get(asked, (asked,)):
            candidates.append(self._start(name, bases[name].members, flow, rival_score))
            rival_score = max(rival_score, candidates[-1].result.held_out_log_likelihood)
            if candidates[-1].result.outcome in ENDED_BY_USER:
                return candidates
        try:
            gains = {c.name: c.result.gain() for c in candidates}
            flows = base_flows.fit_all() if asked == "flow" else base_flows.fit_if_worth_it(gains)
        except KeyboardInterrupt:
            if self.group.size > 1 or not candidates:
                raise
            best = max(range(len(candidates)), key=lambda c: candidates[c].result.held_out_log_likelihood)
            result = candidates[best].result._replace(outcome=Outcome.INTERRUPTED)
            candidates[best] = candidates[best]._replace(result=result)
            return candidates
        if flows:
            candidates.append(self._start("flow", flows, flow))
        if kernels:
            candidates.append(self._start(KERNELS, kernels.members, flow))
        return candidates

    def train_on(self, previous: list[Candidate]) -> list[Candidate]:
        """Go on with the candidates of a previous fit; once the user ends it, the others stay as they were."""
        # These energies are no start from nothing: a high learning rate costs them at first.
        settings = replace(self.settings.train, n_iter_first_gain=self.settings.train.n_iter_no_change)
        candidates: list[Candidate] = []
        for old in previous:
            if candidates and candidates[-1].result.outcome in ENDED_BY_USER:
                model = copy.deepcopy(old.model).to(self.settings.device, torch.float32)
                flow = copy.deepcopy(old.flow).to(self.settings.device, torch.float32)
                candidates.append(old._replace(model=model, flow=flow))
            else:
                candidates.append(self.train(old.name, old.model, old.flow, settings))
        return candidates

    def _make_base_flows(self, small_flow: CouplingFlow, bases: dict[str, Bases]) -> BaseFlows:
        """Prepare a flow per member where `base` asks for flows or may choose them."""
        is_possible = self.settings.base == "auto" and self.data.rows.shape[1] >= MIN_FEATURES
        n_flows = self.data.n_members if self.settings.base == "flow" or is_possible else 0

        def make_flow() -> CouplingFlow:
            # Axes of their own make them differ more, so their mean gains more.
            return self._make_flow(n_layers=base_flow_layers(self.n_rows), own_axes=True)

        def fit(flows: list[CouplingFlow], held_out_folds: list[int]) -> None:
            self.settings.announce(f"base flow, fitting {len(flows)} of {n_flows} flows")
            max_steps = base_flow_steps(self.n_rows, self.n_energy_steps)
            batch_size = base_flow_batch_size(self.settings.train.batch_size)
            self._fit_flows(flows, held_out_folds, max_steps, batch_size, BASE_FLOW_PATIENCE)

        return BaseFlows(make_flow, n_flows, small_flow, fit, bases, self.judged, self.group)

    def train(
        self,
        name: str,
        model: TiltedEnsemble,
        flow: Density,
        settings: TrainSettings,
        rival_score: float = -math.inf,
    ) -> Candidate:
        """Train copies of the model's energies and of the flow."""
        if name in ("flow", KERNELS) and self.settings.base == "auto":
            # They would cost most on flows, unless a user asks for them, and gain nothing on either.
            settings = replace(settings, max_iter=0)
        model = copy.deepcopy(model).to(self.settings.device, torch.float32)
        flow = copy.deepcopy(flow).to(self.settings.device, torch.float32).requires_grad_(True)
        model.thaw()

        def report(check: dict[str, float], snapshot: Callable[[], tuple[TiltedEnsemble, Density]]) -> bool:
            def now() -> Candidate:
                energies, proposing = snapshot()
                score = check["validation_log_likelihood"]
                result = TrainResult(energies, proposing, [], int(check["iteration"]), Outcome.STOPPED, score, {})
                return Candidate(name, energies, proposing, result)

            return self.report(name, self._in_user_units(check), now)

        result = train(
            model,
            flow,
            self.data,
            settings,
            self.device_generator,
            report,
            rival_score,
        )
        if result.outcome is Outcome.UNTRAINED:
            result.model.rescale(0.0)
        return Candidate(name, result.model, result.flow, result)

    @torch.no_grad()
    def temper(self, candidates: list[Candidate]) -> list[Candidate]:
        """Scale energies down where held-out rows become clearly more likely, or where the proposals ask for it.

        One factor for all members of a candidate makes rows most likely; a member that the proposals do not cover even
        so is scaled down further. Energies that make no row clearly more likely are switched off.
        """
        pool = draw_pool(_covering_proposal(candidates), _STACKING_DRAWS, self.common_generator)
        weight = self.judged.held_out_weight()
        tempered = []
        for candidate in candidates:
            model = candidate.model
            if model.is_flat:
                tempered.append(candidate)
                continue
            log_base = model.base_log_prob(self.judged.rows)
            score = torch.empty(len(_SCALES), len(model), dtype=torch.float64)
            is_covered = torch.empty(len(_SCALES), len(model), dtype=torch.int)
            for s, scale in enumerate(_SCALES):
                model.rescale(scale)
                log_normalizer, is_covered[s] = self._member_log_normalizers(model, pool, candidates)
                log_prob = model.log_density(self.judged.rows, log_base) - log_normalizer.unsqueeze(-1)
                score[s] = (weight * log_prob).sum(-1) / weight.sum()
            members, chosen, best_score = torch.arange(len(model)), torch.zeros(len(model), dtype=torch.long), -math.inf
            for s in range(len(_SCALES)):
                allowed = s + is_covered[s:].argmax(0)
                total = float(score[allowed, members].sum())
                if total > best_score + self.settings.train.tol:
                    chosen, best_score = allowed, total
            untilted = float(score[-1].sum())
            if untilted >= best_score - self.settings.train.tol:
                # What the energies add is not worth the time that they take to evaluate.
                chosen, best_score = torch.full_like(chosen, len(_SCALES) - 1), untilted
            model.rescale(torch.tensor(_SCALES, dtype=torch.float32)[chosen])
            result = candidate.result._replace(held_out_log_likelihood=best_score)
            tempered.append(candidate._replace(result=result))
        return tempered

    @torch.no_grad()
    def held_out_log_prob(self, candidates: list[Candidate]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's log density (nats, in z-space) under each candidate's member that never saw it.

        The result has shape (C, n), in float64 on the CPU; it is nan for rows that every member has seen. With it
        comes whether the proposals cover all members of a candidate, shape (C,).
        """
        pool = draw_pool(_covering_proposal(candidates), _STACKING_DRAWS, self.common_generator)
        held_out = torch.full((len(candidates), len(self.data.rows)), math.nan, dtype=torch.float64)
        are_covered = torch.empty(len(candidates), dtype=torch.bool)
        rows_of_member = [(self.data.fold == k).nonzero().squeeze(-1) for k in range(self.data.n_members)]
        padded = nn.utils.rnn.pad_sequence(rows_of_member, batch_first=True)
        for c, candidate in enumerate(candidates):
            log_normalizer, is_covered = self._member_log_normalizers(candidate.model, pool, candidates)
            are_covered[c] = is_covered.all()
            log_density = [candidate.model.log_density(self.data.rows[i]) for i in padded.split(_CHUNK, dim=1)]
            log_prob = (torch.cat(log_density, dim=1) - log_normalizer.unsqueeze(-1)).cpu().double()
            for k, rows in enumerate(rows_of_member):
                held_out[c, rows.cpu()] = log_prob[k, : len(rows)]
        return held_out, are_covered

    def of_judged(self, log_prob: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the judged rows of all processes, given it for the rows of this one, (..., n)."""
        mine = log_prob[..., : max(1, MAX_JUDGED_ROWS // self.group.size)]
        return mine if self.group.size == 1 else self.group.cat(mine)[..., mixed_order(len(self.judged.rows))]

    def _member_log_normalizers(
        self, model: TiltedEnsemble, pool: Pool, candidates: list[Candidate]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every member's log Z (nats), shape (K,), and whether the proposals cover it, shape (K,)."""
        if model.is_flat:
            return torch.zeros(len(model)).to(self.data.rows), torch.ones(len(model), dtype=torch.bool)
        estimates = _member_log_normalizers(model, pool)
        # Only one proposal in C was drawn for a candidate.
        least = self.settings.train.min_effective_sample_size / len(candidates)
        is_covered = torch.tensor([estimate.effective_sample_size >= least for estimate in estimates])
        values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
        # Cast first: some devices know no double precision.
        return values.to(self.data.rows.dtype).to(self.data.rows.device), is_covered

    def _start(self, name: str, bases: Sequence[Density], flow: Density, rival_score: float = -math.inf) -> Candidate:
        with seeded_modules(self.generator):
            energies = self.settings.make_energies(len(bases), self.data.rows.shape[1])
        # All processes look at the same rows, or one would fail alone.
        _check_energies(energies, self.judged.rows[:2].cpu())
        gaussians = [self._gaussian(k) for k in range(len(bases))]
        means, whiteners = (torch.cat([getattr(g, part) for g in gaussians]) for part in ("means", "whiteners"))
        energies = WhitenedEnergies(energies, means, whiteners)
        return self.train(name, TiltedEnsemble(bases, energies), flow, self.settings.train, rival_score)

    def _make_flow(self, **size: int) -> CouplingFlow:
        with seeded_modules(self.generator):
            return self.settings.make_flow(self.data.rows.shape[1], **size).to(self.data.rows)

    def _in_user_units(self, check: dict[str, float]) -> dict[str, float]:
        return {k: v + self.log_det if k.endswith("log_likelihood") else v for k, v in check.items()}

    def _fit_flows(
        self,
        flows: list[CouplingFlow],
        held_out_folds: list[int],
        max_steps: int,
        batch_size: int,
        patience: int,
    ) -> None:
        is_held_out = torch.stack([self.data.fold == fold for fold in held_out_folds])
        for flow, fold in zip(flows, held_out_folds, strict=True):
            gaussian = self._gaussian(fold)
            flow.start_at(gaussian.means[0].to(self.data.rows), gaussian.scale_trils[0].to(self.data.rows))
        fit_flows(
            flows,
            self.data.rows,
            self.data.weight * ~is_held_out,
            self.data.weight * is_held_out,
            max_steps=max_steps,
            batch_size=batch_size,
            generator=self.device_generator,
            patience=patience,
            group=self.group,
            data_share=self.settings.train.data_share,
        )

    def _gaussian(self, held_out_fold: int) -> Mixture:
        """Fit a Gaussian to the rows of all folds but one, in double precision, as all bases."""
        weight = self.judged.weight * (self.judged.fold != held_out_fold)
        return fit_gaussian(self.judged.rows.cpu().double(), weight.cpu().double())


def _feature_map_and_bases(
    data: Folds, settings: FitSettings, generator: torch.Generator
) -> tuple[FeatureMap, dict[str, Bases]]:
    """Resolve the feature map and the bases that cost no gradient training."""
    rows = data.rows.double()
    data = data.with_rows(rows if settings.bounds is None else settings.bounds(rows)[0])
    kinds = _KINDS[settings.base] if isinstance(settings.base, str) else ("gaussian", settings.base)
    if settings.feature_map == "auto":
        feature_map, bases = choose_feature_map(data, kinds, generator)
    else:
        feature_map = fit_feature_map(data.rows, data.weight, use_margins=settings.feature_map == "marginal")
        bases = cross_fit_bases(data, kinds, feature_map, generator)
    if settings.base == "auto" and len(rows) < MAX_ROWS_OF_KERNELS:
        bases[KERNELS] = cross_fit_kernels_and_tails(data, feature_map, bases[HEAVY_TAILED])
    feature_map.bounds = settings.bounds
    return feature_map, bases


def _to_z(data: Folds, feature_map: FeatureMap) -> tuple[Folds, torch.Tensor]:
    """Map rows to z in float32, chunk by chunk; also return log |det| (nats) of each row in float64."""
    z = torch.empty(data.rows.shape, dtype=torch.float32)
    log_det = torch.empty(len(z), dtype=torch.float64)
    for start in range(0, len(z), _CHUNK):
        rows = slice(start, start + _CHUNK)
        z[rows], log_det[rows] = feature_map(data.rows[rows].double())
    return data.with_rows(z), log_det


@torch.no_grad()
def _check_energies(energies: nn.Module, z: torch.Tensor) -> None:
    """Raise if networks of the user's own are not energies."""
    if not any(parameter.requires_grad for parameter in energies.parameters()):
        raise ValueError("The energy has no parameters to train.")
    value = energies.to("cpu", z.dtype)(z)
    if value.shape[1:] != z.shape[:1]:
        raise ValueError(
            f"The energy must map rows of shape (n, {z.shape[1]}) to shape (n,), but for n = {len(z)} it returned "
            f"shape {tuple(value.shape[1:])}. Try .squeeze(-1) at the end of its forward."
        )
    if not value.isfinite().all():
        raise ValueError(f"The energy must be finite before training, but it returned {value.tolist()}.")


def _joint_proposal(candidates: list[Candidate], shares: Sequence[float]) -> DensityMixture:
    """Propose from every candidate's flow and bases, half of it by their shares of the density.

    Bases that no energy tilts propose perfectly, without a flow and by shares alone.
    """
    by_share = 1.0 if all(candidate.model.is_flat for candidate in candidates) else 0.5
    parts = [c.model.untilted() or defensive_proposal(c.flow, list(c.model.bases)) for c in candidates]
    return _mixed([(1 - by_share) / len(candidates) + by_share * share for share in shares], parts)


def _covering_proposal(candidates: list[Candidate]) -> DensityMixture:
    """Propose from every candidate alike: what proposes for one finds mass of another that its own proposals miss.

    Of bases that no energy tilts, one stands for all: no log Z is asked of them, and flows take long.
    """
    parts = [
        DensityMixture(list(c.model.bases)[:1], [1.0])
        if c.model.is_flat
        else defensive_proposal(c.flow, list(c.model.bases))
        for c in candidates
    ]
    return _mixed([1 / len(candidates)] * len(candidates), parts)


def _mixed(shares: Sequence[float], mixtures: Sequence[DensityMixture]) -> DensityMixture:
    """Mix mixtures, of which all components become those of one."""
    pairs = list(zip(shares, mixtures, strict=True))
    return DensityMixture(
        [component for mixture in mixtures for component in mixture.components],
        [share * of_one for share, mixture in pairs for of_one in mixture.proportions],
    )


@torch.no_grad()
def _stack(
    candidates: list[Candidate],
    shares: list[float],
    proposal: DensityMixture,
    generator: torch.Generator,
    std_error: float,
) -> tuple[StackedDensity, LogNormalizer]:
    """Pool the members of each candidate, mix the pools, and return log Z of the whole.

    It is known from those of the pools, of which only that of energies takes an estimate.
    """
    covering = _covering_proposal(candidates)
    of_parts = [_normalize(candidate, covering, generator, std_error) for candidate in candidates]
    share = torch.tensor(shares, dtype=torch.float64)
    values, std_errors, _ = torch.tensor(of_parts, dtype=torch.float64).T
    # Relative to the first, whose log Z is that of the whole then.
    model = StackedDensity([candidate.model for candidate in candidates], share, values - values[0])
    if len(candidates) == 1 or all(candidate.model.is_flat for candidate in candidates):
        return model, of_parts[0]
    fraction = effective_sample_size(log_weight(model, draw_pool(proposal, _CHUNK, generator)))
    return model, LogNormalizer(float(values[0]), float((share * std_errors).norm()), float(fraction))


def _normalize(
    candidate: Candidate, proposal: DensityMixture, generator: torch.Generator, std_error: float
) -> LogNormalizer:
    """Set each member's log Z, then estimate that of the pool."""
    if not candidate.model.is_flat:
        # Common draws: their noise mostly cancels between members.
        estimates = _member_log_normalizers(candidate.model, draw_pool(proposal, _STACKING_DRAWS, generator))
        values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
        candidate.model.log_normalizers.copy_(values)
    alone = StackedDensity([candidate.model], torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    return estimate_log_normalizer_of(alone, proposal, generator, std_error=std_error)


def _member_log_normalizers(model: TiltedEnsemble, pool: Pool) -> list[LogNormalizer]:
    """Estimate log Z (nats) of every member."""
    return estimate_log_normalizers(pool_log_weight(model, pool), pool.controls)


def _to_float64(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates whose modules are float64 on the CPU and no longer train."""
    kept = []
    for candidate in candidates:
        model, flow = copy.deepcopy((candidate.model, candidate.flow))
        for module in (model, flow):
            module.to("cpu", torch.float64).eval().requires_grad_(False)
        result = candidate.result._replace(model=model, flow=flow)
        kept.append(candidate._replace(model=model, flow=flow, result=result))
    return kept
