"""SOAP: Adam along the directions in which the gradients of a matrix vary, which finds fine structure sooner."""

from collections.abc import Sequence
from typing import Any

import torch

# Steps after which the directions are found anew; they change fast at first.
_STEPS_PER_TURN, _FIRST_TURNS = 40, (1, 2, 5, 10)


class SOAP(torch.optim.AdamW):
    """AdamW that moves each matrix along the eigenvectors of the running means of G G^T and G^T G, G its gradient.

    Parameters that are no matrices, such as biases, are moved as by AdamW.

    Parameters
    ----------
    parameters : sequence of tensors
        What to fit. The last two axes are those of a matrix; the others stack matrices that have nothing in common.
    lr, weight_decay, betas
        As those of `torch.optim.AdamW`.
    matrix_factor : float
        The rate of matrices, as a multiple of that of the others: the `lr` of each group is to be its `factor` times
        one rate.

    References
    ----------
    Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        matrix_factor: float,
    ) -> None:
        others = [p for p in parameters if not _is_matrix(p)]
        self.matrices = [_Matrix(p, betas[1]) for p in parameters if _is_matrix(p)]
        turned = [matrix.turned for matrix in self.matrices]
        groups = [{"params": others, "factor": 1.0}, {"params": turned, "factor": matrix_factor}]
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": betas}
        super().__init__([group for group in groups if group["params"]], **options, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        for matrix in self.matrices:
            matrix.parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step, or none where `found_inf` says so, as with AdamW; weights decay all the same."""
        for matrix in self.matrices:
            matrix.turn_gradient(self.state[matrix.turned])
        super().step(closure)
        decay = self.param_groups[0]["lr"] * self.param_groups[0]["weight_decay"]
        for matrix in self.matrices:
            matrix.take_step(decay)


class _Matrix:
    """Shows AdamW the gradient of a stack of matrices along their own directions, and takes the step it makes there."""

    def __init__(self, parameter: torch.Tensor, decay: float) -> None:
        self.parameter, self.decay = parameter, decay
        # What AdamW moves, always from zero.
        self.turned = torch.zeros_like(parameter)
        self.covariances: list[torch.Tensor] = []
        self.directions: list[torch.Tensor] = []
        self.n_steps = 0

    def turn_gradient(self, state: dict[str, torch.Tensor]) -> None:
        """Turn the gradient, and AdamW's mean of gradients, which is in `state`, whenever the directions change."""
        assert self.parameter.grad is not None
        # A gradient that is no number takes no step, and must not stay in the means.
        gradient = self.parameter.grad.nan_to_num(0.0, 0.0, 0.0)
        squares = [gradient @ gradient.mT, gradient.mT @ gradient]
        if self.n_steps == 0:
            self.covariances, self.directions = squares, [_eigenvectors(square) for square in squares]
        elif self.n_steps in _FIRST_TURNS or self.n_steps % _STEPS_PER_TURN == 0:
            mean = self._turned_back(state["exp_avg"])
            # One step of orthogonal iteration: they are the eigenvectors of before, but for what has changed since.
            pairs = zip(self.covariances, self.directions, strict=True)
            self.directions = [_orthogonal(covariance @ direction) for covariance, direction in pairs]
            state["exp_avg"].copy_(self._turn(mean))
        for covariance, square in zip(self.covariances, squares, strict=True):
            covariance.lerp_(square, 1 - self.decay)
        self.n_steps += 1
        self.turned.zero_()
        self.turned.grad = self._turn(gradient)

    def take_step(self, decay: float) -> None:
        """Move the matrix as AdamW has moved what it was shown."""
        self.parameter.mul_(1 - decay).add_(self._turned_back(self.turned))

    def _turn(self, matrix: torch.Tensor) -> torch.Tensor:
        left, right = self.directions
        return left.mT @ matrix @ right

    def _turned_back(self, matrix: torch.Tensor) -> torch.Tensor:
        left, right = self.directions
        return left @ matrix @ right.mT


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.dim() > 1 and min(parameter.shape[-2:]) > 1


# Both on the CPU: the matrices are small, and not every device knows these factorisations.
def _eigenvectors(square: torch.Tensor) -> torch.Tensor:
    """Return the eigenvectors of symmetric matrices as columns, those of the largest eigenvalues first."""
    return torch.linalg.eigh(square.cpu())[1].flip(-1).to(square)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix.cpu())[0].to(matrix)
