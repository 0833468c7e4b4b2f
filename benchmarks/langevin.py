"""A plain energy-based model trained with persistent Langevin chains, as most code trains them: the peer to beat."""

import math

import numpy as np
import torch

from sk_ebm._energy import MLPEnergies
from sk_ebm._kernels import init_local, mala_step


class LangevinEBM:
    """Energy network of three layers of 64 units on a Gaussian base; its negative phase has local moves only.

    The chains persist through training and start from the base. `log_density` is unnormalised.

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
        self.chains = chains
        return self

    def log_density(self, X: np.ndarray) -> np.ndarray:
        """Return unnormalised log densities (nats)."""
        z = torch.from_numpy((X - self.mean) / self.scale).float()
        return self._log_density(z).double().numpy()

    def sample(self) -> np.ndarray:
        """Return the persistent chains, which is how such a model is sampled."""
        return self.chains.numpy() * self.scale + self.mean

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
