"""The processes that train one model together: one by default, or the default group of torch.distributed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class Group:
    """One process by itself: every exchange returns what it is given."""

    size = 1
    rank = 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns, or raise what it raises, in the first process."""
        return make()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process if the block raises in one."""
        yield

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Join the tensors of all processes along the last dimension."""
        return tensor

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace the gradient of each parameter by its mean over the processes."""


ALONE = Group()


class DistributedGroup(Group):
    """The default group of torch.distributed, whose processes all call the same methods in the same order."""

    def __init__(self) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "distributed=True needs a process group, but none is initialized. Start the script with torchrun and "
                "call torch.distributed.init_process_group() before fit, or set distributed=False."
            )
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns, or raise what it raises, in the first process."""
        # The others must hear of a failure too, or they would wait for ever.
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made = [make(), None]
            except Exception as error:
                made = [None, error]
        distributed.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process if the block raises in one."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        for rank, failure in enumerate(self.gather(mine)):
            if failure is not None:
                raise mine or type(failure)(f"In process {rank}: {failure}")

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Join the tensors of all processes along the last dimension."""
        return torch.cat([part.to(tensor.device) for part in self.gather(tensor.cpu())], dim=-1)

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace the gradient of each parameter by its mean over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One message instead of one per parameter.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
