"""The progress line: written over on a terminal, a line per check elsewhere."""

import io

from sk_ebm._progress import ProgressLine

CHECK = {
    "base": "gaussian",
    "iteration": 30,
    "seconds": 10.0,
    "validation_log_likelihood": -1.23456,
    "effective_sample_size": 0.5,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_every_check_is_a_line_of_its_own():
    stream = io.StringIO()
    line = ProgressLine(stream, max_iter=120)
    line.write({**CHECK, "iteration": 0, "seconds": 0.0})
    line.write(CHECK)
    line.close()
    first, second = stream.getvalue().splitlines()
    assert "at most" not in first
    assert "base gaussian, iteration 30/120, 10 s of at most 40 s, held out -1.235 nats, ESS 0.50" in second


def test_on_a_terminal_the_line_is_written_over_and_ended_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    line = ProgressLine(stream, max_iter=120)
    line.write({**CHECK, "base": "student_t"})
    line.write(CHECK)
    line.close()
    blank, first, second = stream.getvalue().split("\r")
    assert blank == ""
    assert len(second.rstrip("\n")) == len(first)
    assert stream.getvalue().count("\n") == 1


def test_a_line_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    ProgressLine(stream, max_iter=120).write(CHECK)
    assert stream.getvalue() == "\r[EBMFlowDensity] base gaussian, iterati"


def test_it_tells_what_is_done_between_checks():
    stream = io.StringIO()
    ProgressLine(stream, max_iter=120).announce("base flow, fitting 1 of 6 flows")
    assert stream.getvalue() == "[EBMFlowDensity] base flow, fitting 1 of 6 flows\n"


def test_a_line_never_begun_is_not_ended():
    stream = Terminal()
    ProgressLine(stream, max_iter=120).close()
    assert stream.getvalue() == ""
