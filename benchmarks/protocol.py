"""How a measured process is told to work, and says how long it took: one JSON object a line, each way.

Standard library only, because the peer's environment imports it too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]]) -> None:
    """Sets up from the settings in the first argument, replies with `info`, then answers requests until its input ends.

    Args:
        start: settings -> (info, handlers by request name). A handler takes the request's other keys.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the replies
    info, handlers = start(json.loads(sys.argv[1]))
    _reply(channel, info)
    for line in sys.stdin:
        request = json.loads(line)
        _reply(channel, handlers[request.pop("do")](**request))


def _reply(channel: Any, value: dict[str, Any]) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


def forget_peak() -> None:
    """Starts the peak anew where the system can (Linux), so that importing and loading are not counted as training."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return  # the peak then includes the start, the same for any number of steps


def peak_bytes() -> int:
    """Peak resident memory of this process, since `forget_peak` where that works.

    Linux's VmHWM starts anew with the program; ru_maxrss does not, it keeps the peak of the process that started it.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
