"""Fit flows to rows by maximum likelihood, several of one size side by side."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from sk_ebm._folds import Batches
from sk_ebm._parallel import ALONE, Group
from sk_ebm._types import Density

_LEARNING_RATE, _WARM_UP = 1e-2, 25
# Steps between checks at least, and checks at most.
_MIN_STEPS_PER_CHECK, _MAX_CHECKS = 25, 40
_MAX_GRAD_NORM = 5.0
# Held-out rows that a check looks at.
_MAX_HELD_OUT = 4096


def fit_flows(
    flows: Sequence[Density],
    z: torch.Tensor,
    weight: torch.Tensor,
    held_out_weight: torch.Tensor,
    *,
    max_steps: int,
    batch_size: int,
    generator: torch.Generator,
    patience: int = 4,
    group: Group = ALONE,
    data_share: float = 1.0,
) -> list[float]:
    """Fit each flow to its own weights of the rows, stop when held-out rows say so, and leave it at its best.

    A step of one flow costs mostly the calls that it takes, not what they compute: six side by side take half the time.

    Parameters
    ----------
    flows : sequence of Density
        K flows of one size.
    z : tensor of shape (n, d)
        Rows.
    weight, held_out_weight : tensor of shape (K, n)
        What each flow is fitted to, and what it is judged by.

    Returns
    -------
    list of float
        Best held-out log-likelihood per row (nats) of each flow.
    """
    stack = _Stack(flows)
    optimizer = torch.optim.AdamW(stack.parameters.values(), lr=_LEARNING_RATE, weight_decay=1e-4, fused=True)
    batches = [Batches(of_flow) for of_flow in weight]
    judged = [of_flow.nonzero().squeeze(-1)[:_MAX_HELD_OUT] for of_flow in held_out_weight]
    z_judged, weight_judged = (
        nn.utils.rnn.pad_sequence([part[rows] for part, rows in zip(parts, judged, strict=True)], batch_first=True)
        for parts in ([z] * len(flows), held_out_weight)
    )
    best_score, best = torch.full((len(flows),), -math.inf, dtype=z.dtype), copy.deepcopy(stack.parameters)
    stale, running = torch.zeros(len(flows), dtype=torch.long), torch.arange(len(flows))
    check_every = max(_MIN_STEPS_PER_CHECK, max_steps // _MAX_CHECKS)
    for step in range(max_steps + 1):
        if step % check_every == 0 or step == max_steps:
            with torch.no_grad():
                of_rows = weight_judged[running] * stack.log_prob(z_judged[running])
                mine = of_rows.sum(1) / weight_judged[running].sum(1)
            score = torch.stack(group.gather(data_share * mine.cpu())).mean(0)
            is_better = score > best_score[running]
            better = running[is_better]
            for name, parameter in stack.parameters.items():
                best[name].data[better] = parameter.detach()[is_better]
            best_score[better] = score[is_better]
            stale[running] += 1
            stale[better] = 0
            is_running = (stale[running] < patience) & score.isfinite()
            if step == max_steps or not is_running.any():
                break
            if not is_running.all():
                running = running[is_running]
                stack.keep(is_running, optimizer)
        for parameters in optimizer.param_groups:
            warm_up, progress = min(1.0, (step + 1) / _WARM_UP), step / max(max_steps, 1)
            parameters["lr"] = _LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        rows = torch.stack([batches[k].draw(batch_size, generator) for k in running])
        loss = -data_share * stack.log_prob(z[rows]).mean(1).sum()
        _descend_apart(loss, optimizer, list(stack.parameters.values()), group)
    _write_back(flows, best)
    return best_score.tolist()


class _Stack:
    """The parameters of several flows in one tensor each, so that one call evaluates all."""

    def __init__(self, flows: Sequence[Density]) -> None:
        self.parameters, self.buffers = stack_module_state([_LogProb(flow) for flow in flows])
        self.module = copy.deepcopy(_LogProb(flows[0])).to("meta")

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the log density (nats) of rows (K, n, d) under the flow of each, shape (K, n)."""
        if len(z) == 1:
            # What `vmap` costs would not pay.
            state = {name: part[0] for name, part in {**self.parameters, **self.buffers}.items()}
            return functional_call(self.module, state, (z[0],)).unsqueeze(0)
        return vmap(lambda *state_and_rows: functional_call(self.module, state_and_rows[:2], state_and_rows[2]))(
            self.parameters, self.buffers, z
        )

    @torch.no_grad()
    def keep(self, is_kept: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Let go of the other flows, of which every step would still pay the price."""
        kept = {name: parameter.detach()[is_kept].requires_grad_() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = optimizer.state.pop(parameter, {})
            optimizer.state[kept[name]] = {key: part if key == "step" else part[is_kept] for key, part in state.items()}
        optimizer.param_groups[0]["params"] = list(kept.values())
        self.parameters = kept
        self.buffers = {name: buffer[is_kept] for name, buffer in self.buffers.items()}


@torch.no_grad()
def _write_back(flows: Sequence[Density], stacked: dict[str, torch.Tensor]) -> None:
    """Give each flow its own of the stacked parameters."""
    for k, flow in enumerate(flows):
        for name, parameter in _LogProb(flow).named_parameters():
            parameter.copy_(stacked[name][k])


class _LogProb(nn.Module):
    """A density whose log density is its forward pass."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density = density

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.density.log_prob(z)


def _descend_apart(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], group: Group
) -> None:
    """Take one gradient step, clipped for each flow by itself; one whose gradient is not finite has none."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    group.average_gradients(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    scale, is_broken = (_MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1), ~norm.isfinite()
    for gradient in gradients:
        shape = -1, *[1] * (gradient.dim() - 1)
        gradient.mul_(scale.view(shape)).masked_fill_(is_broken.view(shape), 0.0)
    optimizer.step()
