"""Pickles that know which version wrote them."""

from typing import Any

from sk_ebm._version import STATE_FORMAT, __version__


class Versioned:
    """Mixin of estimators: one that this version cannot read says so before any of its state is loaded."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Put version and format where unpickling meets them first."""
        return _new, (type(self), STATE_FORMAT, __version__), self.__getstate__()


def _new(cls: type, state_format: int, version: str) -> Any:
    """Make the object that unpickling will then give its state."""
    if state_format != STATE_FORMAT:
        raise ValueError(
            f"This {cls.__name__} was saved by sk_ebm {version} (state format {state_format}), which sk_ebm "
            f"{__version__} (state format {STATE_FORMAT}) cannot read. Load it with sk_ebm {version}, or fit it again."
        )
    return object.__new__(cls)
