"""Train in one call, and look at the finished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from etude.config import TrainConfig, load_config
from etude.errors import unknown
from etude.measuring.pairs import QUANTITIES, Comparison
from etude.measuring.statistics import Estimate, format_interval
from etude.policies import TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.sampling.etas import eta_text
from etude.terminal import clock, figures_table, plain_text
from etude.training.guards import explain_best
from etude.training.progress import Display
from etude.training.trainer import Trainer


@dataclass(frozen=True, repr=False)
class Run:
    """A finished training run; `print` shows its final table.

    `directory` holds the metrics, checkpoints, weights, samples and report.html. `summary` is that of
    `summary.json`, empty in every process but the first.
    """

    directory: Path
    config: TrainConfig
    summary: dict[str, Any]

    def __getitem__(self, reward: str) -> Comparison:
        """The final evaluation of a reward: `run["colorfulness"].improvement` is an `Estimate`.

        Raises:
            EtudeError: the run did not evaluate that reward.
        """
        final = self.summary.get("final", {})
        if reward not in final.get("ode", {}):
            raise unknown("reward of this run", reward, final.get("ode", {}))
        return Comparison(**{q: Estimate.from_dict(final[q][reward]) for q in QUANTITIES if q in final})

    def load(self) -> TrainablePolicy:
        """Load the model with the run's last weights."""
        return load_source(ModelSource.tuned(self.config, self.directory))

    def __repr__(self) -> str:
        if not self.summary:
            return f"Run({str(self.directory)!r})"
        reward = next(iter(self.config.rewards))
        figures = f"{reward} improvement {self[reward].improvement}, gap {self[reward].gap}"
        return f"Run({str(self.directory)!r}, iteration {self.summary['iterations']}, {figures})"

    def __str__(self) -> str:
        blocks = summary_blocks(self.summary) if self.summary else ()
        return plain_text(f"run: {self.directory}", *blocks)


def train(
    recipe: str | Path | TrainConfig,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    policy: TrainablePolicy | None = None,
    display: Display | None = None,
    accept_changes: bool = False,
) -> Run:
    """Fine-tune a model on a reward, and measure the ODE reward and the gap as it trains.

    Args:
        recipe: built-in recipe, YAML file, or a configuration (`etude.load_config`).
        out: run directory, new or empty.
        overrides: values by dotted key, `{"sampling.eta": 1.2}`.
        resume: continue the run that `out` holds, if it holds one; the result is that of a run that
            never stopped.
        policy: model to train. Default: `model` of the configuration.
        display: receiver of the progress (`etude.training.progress.Display`). Default: nobody.
        accept_changes: with `resume`, go on although a prompt file, the model or a reward has changed.
            Default: refuse.

    Raises:
        EtudeError: anything that the user can mend; what was finished before stays in `out`.

    Example:
        >>> import etude
        >>> small = {"iterations": 1, "sampling.num_steps": 2, "rollout.images_per_iteration": 8}
        >>> small |= {"evaluation.num_images": 2, "evaluation.held_out_rewards": []}
        >>> run = etude.train("emoji-ddpo", "runs/first", {"sampling.eta": 1.2, **small})
        >>> run["colorfulness"].improvement.n
        2
        >>> policy = run.load()
    """
    config = load_config(recipe if isinstance(recipe, TrainConfig) else str(recipe), overrides)
    trainer = Trainer(config, out, resume, display, policy, accept_changes)
    return Run(Path(out), config, trainer.train())


def summary_blocks(summary: Mapping[str, Any]) -> Iterator[Table | Text]:
    """The last evaluation as a table, the advice that follows from it, and where the time went."""
    final = summary["final"]
    side = f"SDE, eta = {eta_text(final['eta'])}"
    table = figures_table("reward", "ODE", side, "improvement (ODE)", "gap (ODE - SDE)", "pairs")
    for reward in final["ode"]:
        name = f"{reward} (held out)" if reward in summary.get("held_out_rewards", ()) else reward
        cells = [estimate_text(final, quantity, reward) for quantity in ("ode", "sde", "improvement", "gap")]
        table.add_row(name, *cells, str(final["gap"][reward]["n"]))
    yield table
    note = "means with 95 % intervals; improvement over the base model and gap are paired on prompt and noise"
    yield Text(note, style="dim")
    best = summary.get("best")
    yield from map(Text, filter(None, (summary.get("stopped"), best and explain_best(best), summary.get("deploy"))))
    if chosen := summary.get("speed"):
        yield Text(", ".join(f"{name} {value}" for name, value in chosen.items()), style="dim")
    seconds = summary.get("seconds", {})
    if "total" in seconds:
        shares = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items() if name != "total")
        yield Text(f"time {clock(seconds['total'])}, of which {shares}")


def estimate_text(evaluation: Mapping[str, Any], quantity: str, reward: str) -> str:
    """An estimate of an evaluation with its interval, or a dash where it was not measured."""
    estimate = evaluation.get(quantity, {}).get(reward)
    if estimate is None:
        return "-"
    return format_interval(estimate["mean"], estimate["low"], estimate["high"], quantity in {"gap", "improvement"})
