"""The attention calls of the models by each of torch's kernels, in the layouts that diffusers gives them.

`python -m benchmarks.attention OUT.json`: which call fails, which gives no numbers, how long each takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

KERNELS = ("cudnn", "flash", "efficient")
CALLS: dict[str, dict[str, Any]] = {
    "FLUX.1 512": {"shape": [2, 24, 1536, 128]},
    "FLUX.1 1024": {"shape": [1, 24, 4608, 128]},
    "SD3.5-M 512": {"shape": [4, 24, 1357, 64]},
    "SD1.5 512, own": {"shape": [8, 8, 4096, 40]},
    "SD1.5 512, text": {"shape": [8, 8, 4096, 40], "keys": 77},
    "SDXL 1024, own": {"shape": [2, 10, 4096, 64]},
    "SDXL 1024, text": {"shape": [2, 10, 4096, 64], "keys": 77},
}
WHY: tuple[dict[str, Any], ...] = (
    {"layout": "heads first", "slope": "heads first"},
    {"layout": "heads first", "slope": "tokens first"},
    {"layout": "tokens first", "slope": "heads first"},
    {"layout": "tokens first", "slope": "tokens first", "dtype": "float16"},
    {"layout": "tokens first", "slope": "tokens first", "only": "q"},
    {"layout": "tokens first", "slope": "tokens first", "shape": [1, 24, 1536, 128]},
    {"layout": "tokens first", "slope": "tokens first", "shape": [2, 24, 1500, 128]},
)
"""Variants of FLUX.1's call by cuDNN, one of which may differ from the one that fails."""
TOGETHER = 8
LIMIT = 60


def run() -> list[dict[str, Any]]:
    """Makes every call in a process of its own, several at a time."""
    calls = [{"call": name, "kernel": kernel, **call} for (name, call), kernel in product(CALLS.items(), KERNELS)]
    calls += [{"call": "FLUX.1 512", "kernel": "cudnn", **CALLS["FLUX.1 512"], **variant} for variant in WHY]
    with ThreadPoolExecutor(TOGETHER) as pool:
        results = []
        for result in pool.map(_one, calls):
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def _one(call: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.attention_side", json.dumps(call)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {**call, "error": f"no answer within {LIMIT} seconds"}
    if done.returncode:
        return {**call, "error": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1][:200]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    results = run()
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
