"""What the terminal shows while the command line works, and what libraries may not show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Says on a terminal that something happens while torch loads."""
    from etude.terminal import make_console

    console = make_console(stderr=True)
    with console.status("loading") if console.is_terminal else nullcontext():
        yield


def quiet_libraries() -> None:
    """Leaves stderr to this program: no advice and no bars for reading from the disk. Downloads keep their bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, which already warns
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


@contextmanager
def progress(title: str) -> Iterator[tuple[Any, Any]]:
    """A bar on stderr where that is a terminal; yields what to call with the total and with each advance."""
    from rich.progress import Progress

    from etude.terminal import make_console

    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda total: bar.update(task, total=total), lambda n: bar.advance(task, n)
