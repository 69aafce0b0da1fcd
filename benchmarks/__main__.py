"""`python -m benchmarks [NAME ...]`: tables on the terminal, results/<name>.json and .md."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    against_trl,
    async_rewards,
    cost,
    gpu,
    gpu_trl,
    memory,
    micro_batch,
    mixgrpo,
    overhead,
    precision,
    scaling,
    summary,
    where,
)
from benchmarks.against_trl import Comparison, Work
from benchmarks.processes import BUILD
from benchmarks.results import RESULTS, Headline, Result
from etude.cli.streams import only_shows, outlast_readers


def main(arguments: list[str] | None = None) -> int:
    """Runs the named benchmarks and prints a summary of all results. Default: every benchmark that needs no GPU.

    Returns:
        Exit code: 1 if `--strict` is set and a target is missed, otherwise 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.benchmarks if name not in (*BENCHMARKS, SUMMARY)]:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)} and {SUMMARY}")
    met = True
    for name in dict.fromkeys(options.benchmarks or [name for name in BENCHMARKS if name not in (GPU, GPU_TRL)]):
        if name != SUMMARY:
            result = BENCHMARKS[name](options)
            _show(result.benchmark, result.columns, result.rows, result.headlines)
            print(f"written to {result.write(options.out)}\n")
            met = met and result.met
    lines = summary.collect(options.out, BENCHMARKS)
    _show(SUMMARY, summary.COLUMNS, [line.cells for line in lines])
    print(f"written to {summary.write(options.out, lines)}")
    return int(options.strict and not met)


def _overhead(options: argparse.Namespace) -> Result:
    return overhead.run(options.recipe or RECIPES, options.set, options.repeats or 10, options.threads)


def _profile(options: argparse.Namespace) -> Result:
    return where.run(options.recipe or RECIPES, options.set, options.repeats or 3, options.threads)


def _micro_batch(options: argparse.Namespace) -> Result:
    return micro_batch.run(options.recipe or RECIPES, options.set, options.repeats or 4, options.threads)


def _precision(options: argparse.Namespace) -> Result:
    return precision.run(options.recipe or RECIPES, options.set, options.repeats or 3, options.threads)


def _agreement(options: argparse.Namespace) -> Result:
    from benchmarks import agreement  # which loads torch, and the timings of other processes must not wait for it

    return agreement.run(options.recipe or RECIPES, options.threads, options.seed)


def _scaling(options: argparse.Namespace) -> Result:
    return scaling.run(options.recipe or RECIPES, options.set, scaling.Work(), options.repeats or 5)


def _cost(options: argparse.Namespace) -> Result:
    recipe = (options.recipe or RECIPES)[0]
    return cost.run(recipe, options.set, options.repeats or 4, options.threads)


def _trl(options: argparse.Namespace) -> Result:
    return against_trl.run(AGAINST_TRL, options.repeats or 10, options.threads, options.seed, options.trl_venv)


def _memory(options: argparse.Namespace) -> Result:
    return memory.run([5, 10, 20, 40], [16, 32, 64], [64, 128, 192], 64, options.threads, options.seed)


def _mixgrpo(options: argparse.Namespace) -> Result:
    work = mixgrpo.Work()
    places = work.num_steps - work.window - 1  # the first step and the last cannot be trained
    return mixgrpo.run(work, options.model, options.repeats or places, options.threads, options.seed)


def _gpu(options: argparse.Namespace) -> Result:
    def show(result: Result) -> None:
        print(f"{result.rows[-1][0]}: written to {options.out / GPU}.json", flush=True)

    if options.tiny and options.out == RESULTS:
        options.out = BUILD  # figures of tiny models are no results
    cases = [case for case in gpu.CASES if not options.case or case.name in options.case]
    return gpu.run(cases, options.tiny, options.out, options.limit, show, options.within)


def _gpu_trl(options: argparse.Namespace) -> Result:
    if options.tiny and options.out == RESULTS:
        options.out = BUILD
    environment = options.trl_venv or against_trl.peer_environment()
    return gpu_trl.run(environment / "bin" / "python", options.tiny, options.repeats or 3, options.limit)


def _async_rewards(options: argparse.Namespace) -> Result:
    return async_rewards.run(async_rewards.Work(), options.repeats or 5, options.threads)


RECIPES = ["emoji-ddpo", "emoji-mixgrpo"]
GPU, GPU_TRL = "gpu", "gpu_trl"
"""The benchmarks that must be named to run: they are for a GPU."""
SUMMARY = "summary"
"""One table of all results, of this run and of earlier ones: printed last, or alone."""
SMALL, LARGER = Work((4, 8)), Work((32, 64))
"""Channels of the pipelines in diffusers' own tests, and of the tiny ones on the model hub."""
OURS = (32, 160)
"""Batch sizes that take the whole rollout, and a whole optimiser step, in one network call."""
AGAINST_TRL = [
    Comparison(SMALL, (32, 16), OURS),  # the largest that 32 images and two optimiser steps allow
    Comparison(SMALL, (8, 4), OURS),
    Comparison(SMALL, (1, 1), OURS),  # DDPOConfig's defaults
    Comparison(LARGER, (32, 16), OURS),
    Comparison(LARGER, (8, 4), OURS),
]

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "overhead": _overhead,
    "profile": _profile,
    "trl": _trl,
    "mixgrpo": _mixgrpo,
    "precision": _precision,
    "agreement": _agreement,
    "micro_batch": _micro_batch,
    "cost": _cost,
    "scaling": _scaling,
    "memory": _memory,
    "async_rewards": _async_rewards,
    GPU: _gpu,
    GPU_TRL: _gpu_trl,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="BENCHMARK",
        help=f"{', '.join(BENCHMARKS)}; all but {GPU} and {GPU_TRL} by default",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--repeats", type=int, help="interleaved rounds of timings (default: each benchmark's own)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipe",
        action="append",
        help=f"overhead, profile, precision, agreement, micro_batch, cost, scaling: a recipe, by name or YAML file (default: {', '.join(RECIPES)})",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="overrides of what --recipe names"
    )
    parser.add_argument(
        "--trl-venv", type=Path, help="trl: an environment that has it already (default: one is made under build/)"
    )
    parser.add_argument("--model", help="mixgrpo: a FLUX model, by name or directory (default: a random one)")
    parser.add_argument("--tiny", action="store_true", help="gpu: very small models, to try it out, also on a CPU")
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.name for case in gpu.CASES],
        help="gpu: a model and size (default: all)",
    )
    parser.add_argument(
        "--limit", type=float, default=gpu.LIMIT, help="gpu: seconds of each process (default: %(default)g)"
    )
    parser.add_argument("--within", type=float, help="gpu: seconds after which no further case is begun")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _show(title: str, columns: list[str], rows: list[list[str]], headlines: Sequence[Headline] = ()) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for one in headlines:
        console.print(str(one), style="green" if one.met else "red", highlight=False)


if __name__ == "__main__":
    outlast_readers()
    only_shows()  # the results are files
    raise SystemExit(main())
