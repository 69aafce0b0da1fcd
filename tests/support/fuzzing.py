"""What every fuzzed case must hold to: one sentence or a result, in seconds, and no half of a file left behind."""

from __future__ import annotations

import functools
import inspect
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings

from etude.errors import EtudeError

CASES: Counter[str] = Counter()
"""How many cases of each subject have run; pytest prints the counts at the end."""
SECONDS = 20
"""In which a single case ends on the slowest machine: it takes milliseconds."""
_IN_WORKER = "fuzzed cases"
"""Key of a worker's counts in what it hands to the process that started it."""
_Test = TypeVar("_Test", bound=Callable[..., Any])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the counts of a worker of pytest-xdist to the process that started it."""
    handed: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if handed is not None:
        handed[_IN_WORKER] = dict(CASES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds the counts of a worker that has ended; a worker that crashed hands over none."""
    CASES.update(getattr(node, "workeroutput", {}).get(_IN_WORKER, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many fuzzed cases ran, if any did."""
    if CASES:
        subjects = ", ".join(f"{count} {subject}" for subject, count in sorted(CASES.items()))
        terminalreporter.write_line(f"{CASES.total()} fuzzed cases: {subjects}")


class _HangError(BaseException):
    """Beyond `Exception`, so that nothing that is tested can take it for its own."""


def fuzz(subject: str, examples: int, **strategies: Any) -> Callable[[_Test], Callable[..., None]]:
    """A property test that draws the same `examples` cases in every run, counts them, and fails if there were fewer."""

    def decorate(test: _Test) -> Callable[..., None]:
        ran = 0

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        @functools.wraps(test)
        def case(*args: Any, **drawn: Any) -> None:
            nonlocal ran
            ran += 1
            with in_time():
                test(*args, **drawn)

        def counted(*args: Any, **fixtures: Any) -> None:
            nonlocal ran
            ran = 0
            case(*args, **fixtures)
            CASES[subject] += ran
            assert ran >= examples, f"only {ran} of {examples} cases were drawn"

        # by hand, since functools.wraps would also copy what makes pytest take this for Hypothesis's own
        counted.__name__, counted.__doc__, counted.__module__ = test.__name__, test.__doc__, test.__module__
        fixtures = [p for name, p in inspect.signature(test).parameters.items() if name not in strategies]
        counted.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]
        return counted

    return decorate


@contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    """Ends what hangs."""

    def end(*_: Any) -> None:
        raise _HangError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(function: Callable[..., Any], *args: Any, **options: Any) -> str | None:
    """The sentence with which a call was refused, None if it was not; any other error is a defect and goes through."""
    try:
        function(*args, **options)
    except EtudeError as error:
        check_sentence(str(error))
        return str(error)
    return None


def check_sentence(message: str) -> None:
    """What a user is shown: not empty, and short enough to be read."""
    assert message.strip(), "an error without a text"
    assert len(message) < 12_000, f"an error of {len(message)} letters: {message[:200]}"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory with its bytes, so that what was written can be seen."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
