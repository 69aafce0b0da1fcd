"""Show on the terminal that the command line works, and keep libraries quiet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Show on a terminal that something happens while torch loads."""
    from etude.terminal import make_console

    console = make_console(stderr=True)
    with console.status("loading") if console.is_interactive else nullcontext():
        yield


def quiet_libraries() -> None:
    """Keep stderr for this program: no advice of libraries, no bars but those of downloads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, which already warns
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr; yields a function of the work just done and the total."""
    from rich.progress import Progress

    from etude.terminal import make_console

    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_interactive) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, total=total, advance=done)
