"""Peak memory of a call, as Linux counts it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def with_peak_memory(run: Callable[[], T]) -> tuple[T, float]:
    """Return what `run` returns, and by how much (MiB) the memory of this process rose meanwhile at most.

    getrusage would not do: its peak is that of the whole life of the process, and of the one that started it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    return result, (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
