"""The interface that bases, flows and proposals share, and a module list that keeps the type of its items."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    ModuleT = TypeVar("ModuleT", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[ModuleT]):
        """What `nn.ModuleList` is, but its items stay of their own type."""

        def __init__(self, modules: Iterable[ModuleT]) -> None: ...
        def __iter__(self) -> Iterator[ModuleT]: ...
        def __reversed__(self) -> Iterator[ModuleT]: ...
else:
    ModuleList = nn.ModuleList


class Density(nn.Module, ABC):
    """Normalised density that can be evaluated and drawn from."""

    # Whether it takes networks to evaluate.
    is_slow = False

    @abstractmethod
    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""

    @abstractmethod
    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
