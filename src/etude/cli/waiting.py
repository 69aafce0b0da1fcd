"""Signs of progress on the terminal, and silence from the libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Context for heavy imports: a terminal shows "loading" meanwhile."""
    from etude.terminal import make_console

    console = make_console(stderr=True)
    with console.status("loading") if console.is_terminal else nullcontext():
        yield


def quiet_libraries() -> None:
    """Silences the libraries' advice and their bars for reading from disk. Downloads keep their bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, which may already warn
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


@contextmanager
def progress(title: str) -> Iterator[tuple[Any, Any]]:
    """Context with a bar on stderr, if it is a terminal.

    Yields:
        Two functions: one to call with the total, one to call with each advance.
    """
    from rich.progress import Progress

    from etude.terminal import make_console

    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda total: bar.update(task, total=total), lambda n: bar.advance(task, n)
