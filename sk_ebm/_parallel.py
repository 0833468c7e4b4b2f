"""The processes that train one model together: one by default, or the default group of torch.distributed."""

import pickle
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
        failure: Exception | None = None
        if self.rank == 0:
            try:
                made[0] = pickle.dumps(make())
            except Exception as error:
                made[1], failure = _described(error), error
        distributed.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise failure or _described_error(0, made[1])
        return pickle.loads(made[0])

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process if the block raises in one."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        for rank, described in enumerate(self.gather(None if mine is None else _described(mine))):
            if described is not None:
                raise mine or _described_error(rank, described)

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


def _described(error: Exception) -> tuple[bool, str]:
    """Return what can be sent of any error: whether it is about a type, and its message."""
    return isinstance(error, TypeError), str(error)


def _described_error(rank: int, described: tuple[bool, str]) -> Exception:
    is_type_error, message = described
    return (TypeError if is_type_error else ValueError)(f"In process {rank}: {message}")
