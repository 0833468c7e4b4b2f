"""
==========================
The weights of known modes
==========================

Two modes hold .95 and .05 of the probability. Local Markov chains never cross the gap between them, so an energy-based
model that is trained with such chains alone has nothing that tells it how deep one mode is against the other. In
EBMFlowDensity a flow proposes moves from mode to mode all through the training, and the weights come out right.

The peer here is the usual recipe: the energy network of the same size, trained with persistent Langevin chains. Its
weights are read from its density by quadrature on a grid, so they are those of the model and not of a poor sampler.

Run with an optional path for the picture: ``python examples/plot_mode_weights.py mode_weights.png``.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

from sk_ebm import EBMFlowDensity, class_proportions

WEIGHTS = np.array([0.95, 0.05])
LIMIT = 6.5


def draw_mixture(n_samples, random_state):
    """Two round Gaussians, six standard deviations apart."""
    rng = np.random.default_rng(random_state)
    is_second = rng.random(n_samples) >= WEIGHTS[0]
    return rng.standard_normal((n_samples, 2)) + np.where(is_second[:, None], [-3.0, 0.0], [3.0, 0.0])


def mode(X):
    """Mode of each row: 0 on the right, 1 on the left."""
    return (X[:, 0] < 0).astype(int)


def fit_langevin(X, n_steps=2000, n_moves=5, n_chains=512, random_state=0):
    """Train an energy network with persistent, unadjusted Langevin chains; return its unnormalised log density."""
    generator = torch.Generator().manual_seed(random_state)
    mean, scale = X.mean(0), X.std(0)
    rows = torch.from_numpy((X - mean) / scale).float()
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        layers = [layer for d in (2, 64, 64) for layer in (torch.nn.Linear(d, 64), torch.nn.SiLU())]
        energy = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
    chains, step_size = torch.randn(n_chains, 2, generator=generator), 0.02

    def log_density(z):
        return -energy(z).squeeze(-1) - 0.5 * z.square().sum(-1)

    for _ in range(n_steps):
        for _ in range(n_moves):
            chains.requires_grad_(True)
            (gradient,) = torch.autograd.grad(log_density(chains).sum(), chains)
            noise = torch.randn(chains.shape, generator=generator)
            chains = (chains + step_size * gradient + (2 * step_size) ** 0.5 * noise).detach()
        batch = rows[torch.randint(len(rows), (256,), generator=generator)]
        loss = energy(batch).mean() - energy(chains).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda X: log_density(torch.from_numpy((X - mean) / scale).float()).detach().double().numpy()


# %%
# Fit both.

X = draw_mixture(2000, random_state=0)
model = EBMFlowDensity(random_state=0).fit(X)
langevin_log_density = fit_langevin(X)

# %%
# Densities on a grid; the grid normalises the peer.

ticks = np.linspace(-LIMIT, LIMIT, 301)
grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
cell = (ticks[1] - ticks[0]) ** 2
langevin_density = np.exp(langevin_log_density(grid))
langevin_density /= langevin_density.sum() * cell
densities = {"EBMFlowDensity": np.exp(model.score_samples(grid)), "persistent Langevin": langevin_density}
truth = np.exp(-0.5 * ((grid[:, None] - [[3, 0], [-3, 0]]) ** 2).sum(-1)) / (2 * np.pi) @ WEIGHTS

# %%
# The weight of the smaller mode.

shares = class_proportions(model, mode, random_state=0)
weights = {
    "truth": WEIGHTS[1],
    "2000 training rows": mode(X).mean(),
    "EBMFlowDensity": shares.proportions[1],
    "persistent Langevin": langevin_density[grid[:, 0] < 0].sum() * cell,
}
print("Weight of the smaller mode")
for name, weight in weights.items():
    error = f" +- {shares.std_errors[1]:.4f}" if name == "EBMFlowDensity" else ""
    print(f"  {name:<20}{weight:.4f}{error}")
drawn = mode(model.sample(20_000, random_state=0)).mean()
print(f"  EBMFlowDensity, counted in 20000 draws: {drawn:.4f}")

# %%
# Truth, training rows and both densities. The colours are those of the logarithm, so that the smaller mode shows.

fig, axes = plt.subplots(1, 4, figsize=(15, 4), sharex=True, sharey=True, layout="constrained")
axes[1].scatter(X[:, 0], X[:, 1], s=5, color="#0072B2", alpha=0.6, linewidths=0)
for ax, density in zip(axes[[0, 2, 3]], [truth, *densities.values()], strict=True):
    image = ax.imshow(
        np.log10(density.reshape(301, 301)), vmin=-6, vmax=-0.8, origin="lower", extent=(-LIMIT, LIMIT, -LIMIT, LIMIT)
    )
for ax, (name, weight) in zip(axes, weights.items(), strict=True):
    ax.set(title=f"{name}\nsmaller mode {weight:.3f}", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
fig.colorbar(image, ax=axes, shrink=0.8, label="log10 density")

path = sys.argv[1] if len(sys.argv) > 1 else "mode_weights.png"
fig.savefig(path, dpi=120)
print(f"Picture written to {path}")
