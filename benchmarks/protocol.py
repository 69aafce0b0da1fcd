"""The protocol of a measured process: requests and replies are JSON objects, one a line.

Only the standard library is used, because the peer's environment imports this module, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]]) -> None:
    """Serves one measured program on standard input and output.

    The settings are the first command-line argument. The program replies with `info`, then answers
    requests until its input ends.

    Args:
        start: function from settings to (info, handlers by request name). A handler takes the
            request's other keys.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of a library go to the log, not between the replies
    info, handlers = start(json.loads(sys.argv[1]))
    _reply(channel, info)
    for line in sys.stdin:
        request = json.loads(line)
        _reply(channel, handlers[request.pop("do")](**request))


def _reply(channel: Any, value: dict[str, Any]) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


def forget_peak() -> None:
    """Resets the peak, on Linux, so that imports and loading do not count as training."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return  # the peak then includes the start, which is the same for any number of steps


def peak_bytes() -> int:
    """Peak resident memory of this process, since `forget_peak` if the system can reset it.

    Linux's VmHWM starts anew with the program. ru_maxrss does not: it keeps the peak of the process
    that started the program.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
