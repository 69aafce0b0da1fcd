"""`python -m benchmarks [overhead] [trl] [memory] [mixgrpo] [async_rewards]`: prints a table for each, writes results/<name>.json and .md."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import against_trl, async_rewards, memory, mixgrpo, overhead
from benchmarks.against_trl import Comparison, Work
from benchmarks.results import RESULTS, Result


def main(arguments: list[str] | None = None) -> int:
    """Runs the named benchmarks, all by default. 1 if a target is missed and `--strict` was given."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.benchmarks if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    met = True
    for name in dict.fromkeys(options.benchmarks or BENCHMARKS):
        result = BENCHMARKS[name](options)
        _show(result)
        print(f"written to {result.write(options.out)}\n")
        met = met and result.headline.met
    return int(options.strict and not met)


def _overhead(options: argparse.Namespace) -> Result:
    return overhead.run(options.recipe, options.set, options.repeats or 10, options.threads)


def _trl(options: argparse.Namespace) -> Result:
    return against_trl.run(AGAINST_TRL, options.repeats or 10, options.threads, options.seed, options.trl_venv)


def _memory(options: argparse.Namespace) -> Result:
    return memory.run(
        [5, 10, 20, 40], images=32, latent_size=64, iterations=2, threads=options.threads, seed=options.seed
    )


def _mixgrpo(options: argparse.Namespace) -> Result:
    work = mixgrpo.Work()
    places = work.num_steps - work.window - 1  # the first step and the last cannot be trained
    return mixgrpo.run(work, options.model, options.repeats or places, options.threads, options.seed)


def _async_rewards(options: argparse.Namespace) -> Result:
    return async_rewards.run(async_rewards.Work(), options.repeats or 5, options.threads)


SMALL, LARGER = Work((4, 8)), Work((32, 64))
"""The channels of the pipelines in diffusers' own tests, and of the tiny ones that are on the model hub."""
OURS = (32, 160)
"""The whole rollout, and the whole of an optimiser step, in one network call."""
AGAINST_TRL = [
    Comparison(SMALL, (32, 16), OURS),  # the largest that 32 images and two optimiser steps allow
    Comparison(SMALL, (8, 4), OURS),
    Comparison(SMALL, (1, 1), OURS),  # DDPOConfig's defaults
    Comparison(LARGER, (32, 16), OURS),
    Comparison(LARGER, (8, 4), OURS),
]

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "overhead": _overhead,
    "trl": _trl,
    "memory": _memory,
    "mixgrpo": _mixgrpo,
    "async_rewards": _async_rewards,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--repeats", type=int, help="interleaved pairs of timings (default 10; mixgrpo: 20)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="emoji-ddpo", help="overhead: the recipe, a name or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="overhead: overrides of the recipe"
    )
    parser.add_argument(
        "--trl-venv", type=Path, help="trl: an environment that has it already (default: one is made under build/)"
    )
    parser.add_argument("--model", help="mixgrpo: a FLUX model, by name or directory (default: a random one)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _show(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*result.columns, title=result.benchmark)
    for row in result.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(str(result.headline), style="green" if result.headline.met else "red", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
