"""The line that `verbose` writes."""

import shutil
from typing import Any, TextIO


class ProgressLine:
    """One line that is written over at every check on a terminal, and a line per check anywhere else.

    Parameters
    ----------
    stream : text stream
        Where to write.
    max_iter : int
        Most iterations on one base.
    """

    def __init__(self, stream: TextIO, max_iter: int) -> None:
        self.stream, self.max_iter = stream, max_iter
        # A stand-in for the standard output need not have all of a file.
        self.is_terminal = getattr(stream, "isatty", lambda: False)()
        self._width = 0

    def write(self, check: dict[str, Any]) -> None:
        """Show a validation check."""
        iteration, seconds = check["iteration"], check["seconds"]
        # First what matters most: a narrow terminal shows no more.
        text = f"[EBMFlowDensity] base {check['base']}, iteration {iteration}/{self.max_iter}, {seconds:.0f} s"
        if iteration:
            text += f" of at most {seconds / iteration * self.max_iter:.0f} s"
        self._show(
            f"{text}, held out {check['validation_log_likelihood']:.3f} nats, ESS {check['effective_sample_size']:.2f}"
        )

    def announce(self, what: str) -> None:
        """Show what is done between two checks, where it takes long."""
        self._show(f"[EBMFlowDensity] {what}")

    def _show(self, text: str) -> None:
        if self.is_terminal:
            # What wraps could not be written over.
            text = text[: shutil.get_terminal_size().columns - 1]
            # Blanks wipe out what is left of a longer line before.
            self.stream.write("\r" + text.ljust(self._width))
            self.stream.flush()
            self._width = len(text)
        else:
            self.stream.write(text + "\n")

    def close(self) -> None:
        """End the line."""
        if self.is_terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()
