"""Plain energy-based models trained with persistent Langevin chains, as most code trains them: the peers to beat."""

import math

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torchebm.core import BaseModel
from torchebm.losses import ContrastiveDivergence
from torchebm.samplers import LangevinDynamics

from sk_ebm._energy import MLPEnergies
from sk_ebm._kernels import init_local, mala_step


class NormalisedLater:
    """Energy-based model whose training leaves log Z open; importance sampling from a Gaussian mixture finds it."""

    n_draws = 50_000

    def log_density(self, X: np.ndarray) -> np.ndarray:
        """Return unnormalised log densities (nats)."""
        raise NotImplementedError

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        """Return log densities (nats)."""
        return self.log_density(X) - self.log_normalizer

    def normalise(self, X: np.ndarray) -> None:
        """Estimate log Z by proposals from a mixture fitted to the rows of X, and from one twice as wide."""
        n_components = max(1, min(8, len(X) // 20))
        narrow = GaussianMixture(n_components, reg_covar=1e-4, random_state=self.random_state).fit(X)
        wide = GaussianMixture(1, reg_covar=1e-4, random_state=self.random_state).fit(X.mean(0) + 2 * (X - X.mean(0)))
        draws = np.vstack([part.sample(self.n_draws // 2)[0] for part in (narrow, wide)])
        log_proposal = np.logaddexp(narrow.score_samples(draws), wide.score_samples(draws)) - math.log(2)
        log_weight = self.log_density(draws) - log_proposal
        self.log_normalizer = float(np.logaddexp.reduce(log_weight)) - math.log(len(draws))


class LangevinEBM(NormalisedLater):
    """Energy network of three layers of 64 units on a Gaussian base; its negative phase has local moves only.

    The chains persist through training and start from the base.

    Parameters
    ----------
    n_steps : int
        Gradient steps; each follows `n_moves` Langevin moves of all chains.
    random_state : int
        Seed.
    """

    def __init__(self, n_steps: int = 2000, n_moves: int = 5, n_chains: int = 512, random_state: int = 0) -> None:
        self.n_steps, self.n_moves, self.n_chains, self.random_state = n_steps, n_moves, n_chains, random_state

    def fit(self, X: np.ndarray) -> "LangevinEBM":
        """Train on the rows of X."""
        generator = torch.Generator().manual_seed(self.random_state)
        with torch.random.fork_rng():
            torch.manual_seed(self.random_state)
            self.energies = MLPEnergies(1, X.shape[1], (64, 64, 64))
        self.mean, self.scale = X.mean(0), X.std(0)
        z = torch.from_numpy((X - self.mean) / self.scale).float()
        step_size = torch.tensor([0.1 / X.shape[1] ** (1 / 3)])
        optimizer = torch.optim.Adam(self.energies.parameters(), lr=2e-3)
        chains = torch.randn(self.n_chains, X.shape[1], generator=generator)
        for step in range(self.n_steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / self.n_steps))
            self.energies.requires_grad_(False)
            chains, rate = self._move(chains, step_size, generator)
            step_size = step_size * math.exp(0.1 * (rate - 0.6))
            self.energies.requires_grad_(True)
            rows = z[torch.randint(len(z), (256,), generator=generator)]
            picks = chains[torch.randint(len(chains), (256,), generator=generator)]
            loss = self.energies(rows).mean() - self.energies(picks).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.energies.parameters(), 5.0)
            optimizer.step()
        self.energies.requires_grad_(False)
        self.chains, self.step_size = chains, step_size
        self.normalise(X)
        return self

    def log_density(self, X: np.ndarray) -> np.ndarray:
        """Return unnormalised log densities (nats)."""
        z = torch.from_numpy((X - self.mean) / self.scale).float()
        return self._log_density(z).double().numpy()

    def sample(self, n_samples: int) -> np.ndarray:
        """Draw rows: persistent chains, picked at random and moved on."""
        generator = torch.Generator().manual_seed(self.random_state)
        picks = torch.randint(len(self.chains), (n_samples,), generator=generator)
        chains = self.chains[picks]
        for _ in range(4):
            chains, _ = self._move(chains, self.step_size, generator)
        return chains.double().numpy() * self.scale + self.mean

    def _log_density(self, z: torch.Tensor) -> torch.Tensor:
        return -self.energies(z).squeeze(0) - 0.5 * z.square().sum(-1)

    def _move(
        self, chains: torch.Tensor, step_size: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        def target(position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                position = position.detach().requires_grad_(True)
                value = self._log_density(position)
                return value.detach(), torch.autograd.grad(value.sum(), position)[0]

        state, rate = init_local(chains, target), 0.0
        for _ in range(self.n_moves):
            state, info = mala_step(state, target, step_size=step_size, generator=generator)
            rate += float(info.acceptance_rate.mean()) / self.n_moves
        return state.position, rate


class _Energy(BaseModel):
    """Energy network of three layers of 64 units, plus that of a standard normal, so that it has a normalizer."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        sizes, layers = [n_features, 64, 64, 64], []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.SiLU()]
        self.network = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.network(x).squeeze(-1) + 0.5 * x.square().sum(-1)


class TorchEBM(NormalisedLater):
    """Energy network trained by the persistent contrastive divergence of torchebm.

    Parameters
    ----------
    n_steps : int
        Gradient steps; each follows ten Langevin moves.
    random_state : int
        Seed.
    """

    def __init__(self, n_steps: int = 1500, random_state: int = 0) -> None:
        self.n_steps, self.random_state = n_steps, random_state

    def fit(self, X: np.ndarray) -> "TorchEBM":
        """Train on the rows of X, which should be standardised."""
        with torch.random.fork_rng():
            torch.manual_seed(self.random_state)
            self.energy = _Energy(X.shape[1])
            self.sampler = LangevinDynamics(model=self.energy, step_size=0.01)
            loss = ContrastiveDivergence(
                model=self.energy,
                sampler=self.sampler,
                k_steps=10,
                persistent=True,
                buffer_size=2000,
                init_steps=0,
                # A penalty on large energies would bias a density whose energy grows as it should.
                energy_reg_weight=0.0,
            )
            optimizer = torch.optim.Adam(self.energy.parameters(), lr=1e-3)
            rows = torch.from_numpy(X).float()
            for _ in range(self.n_steps):
                value, _ = loss(rows[torch.randint(len(rows), (256,))])
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(self.energy.parameters(), 5.0)
                optimizer.step()
        self.energy.requires_grad_(False)
        self.normalise(X)
        return self

    def log_density(self, X: np.ndarray) -> np.ndarray:
        """Return unnormalised log densities (nats)."""
        return -self.energy(torch.from_numpy(X).float()).double().numpy()

    def sample(self, n_samples: int) -> np.ndarray:
        """Draw rows by Langevin moves from noise."""
        with torch.random.fork_rng():
            torch.manual_seed(self.random_state)
            start = torch.randn(n_samples, self.energy.network[0].in_features)
            return self.sampler.sample(x=start, n_steps=200).double().numpy()
