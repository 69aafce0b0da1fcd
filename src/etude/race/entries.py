"""The runs of a race: pilots, the choice among them, and the cells that race."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from etude.config import TrainConfig, parse_config
from etude.config.tree import read_tree, set_key
from etude.errors import EtudeError
from etude.race.budget import Counter
from etude.race.race_file import HeatConfig, RaceFile
from etude.rewards.reward import WEIGHTED_SUM
from etude.runs.reader import parse_metrics
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell, Keys, file_name


@dataclass(frozen=True)
class Entry:
    """A method in a heat: its pilots, with the values of each, and its cells, one a seed.

    The cells have the values of the first pilot until the pilots are done.
    """

    heat: HeatConfig
    method: str
    pilots: tuple[Cell, ...]
    choices: tuple[Keys, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PilotResult:
    """The result of a pilot.

    Attributes:
        values: values of the pilot, by dotted key.
        improvement: mean of the trained reward minus that of the base model, under the ODE.
        held_out: the same of every reward that is not trained.
        excess: largest amount by which a held-out reward fell further than allowed; 0 if none did.
        failure: reason of a pilot without a result; empty for the others.
    """

    values: Keys
    improvement: float = 0.0
    held_out: Mapping[str, float] | None = None
    excess: float = 0.0
    failure: str = ""


class Entries:
    """All runs of a race, laid out: each gets the iterations that its budget pays for.

    Raises:
        EtudeError: a configuration cannot be used, or a budget does not pay for one iteration.
    """

    def __init__(self, race: RaceFile) -> None:
        self.race, self.settings, self.counter = race, race.settings, Counter()
        self.all = [self._entry(heat, name) for heat in self.settings.heats for name in self.settings.entrants(heat)]

    @property
    def cells(self) -> list[Cell]:
        """Every run in the order in which it is run: a heat's pilots, then each seed of all its methods."""
        ordered: list[Cell] = []
        for heat in self.settings.heats:
            entries = [entry for entry in self.all if entry.heat is heat]
            ordered += [cell for round_ in zip(*(e.pilots for e in entries), strict=True) for cell in round_]
            ordered += [cell for round_ in zip(*(e.cells for e in entries), strict=True) for cell in round_]
        return ordered

    def settle(self, cell: Cell, directory: StudyDirectory) -> Cell | None:
        """The cell with the values that its method's pilots have chosen; a pilot as it is.

        None: some pilot has no result yet, or none has one at all.
        """
        entry = next(e for e in self.all if any(c.slug == cell.slug for c in (*e.pilots, *e.cells)))
        if not cell.measured:
            return cell
        chosen = choose(self.results(entry, directory))
        if chosen is None:
            return None
        return self._cell(entry.heat, entry.method, entry.choices[chosen], cell.config.seed)

    def results(self, entry: Entry, directory: StudyDirectory) -> list[PilotResult | None]:
        """The result of each pilot; None for one that is not done."""
        return [self._result(entry, *each, directory) for each in zip(entry.pilots, entry.choices, strict=True)]

    def _result(self, entry: Entry, cell: Cell, values: Keys, directory: StudyDirectory) -> PilotResult | None:
        progress = directory.progress(cell, look_for_others=False)
        if progress.state == "failed":
            return PilotResult(values, failure=progress.failure)
        stored = directory.file(cell, "metrics.jsonl") if progress.state == "done" else None
        if stored is None:
            return None
        rows = parse_metrics(stored.text(), stored.place)[0]
        means = {name: each["mean"] for name, each in rows[-1]["evaluation"]["improvement"].items()}
        held_out = {name: mean for name, mean in means.items() if name not in cell.config.rewards}
        trained = means[judged(cell.config)]
        falls = [-means[name] - limit for name, limit in self.settings.pilots.largest_fall.items() if name in held_out]
        return PilotResult(values, trained, held_out, max([0.0, *falls]))

    def _entry(self, heat: HeatConfig, name: str) -> Entry:
        settings, method = self.settings, self.settings.methods[name]
        choices = tuple(method.choices)
        pilots = tuple(self._pilot(heat, name, number, values) for number, values in enumerate(choices, start=1))
        cells = tuple(self._cell(heat, name, choices[0], seed) for seed in settings.seeds)
        return Entry(heat, name, pilots, choices, cells)

    def _pilot(self, heat: HeatConfig, name: str, number: int, values: Keys) -> Cell:
        asked = self.settings.pilots
        slug = f"{file_name(heat.name)}_{file_name(name)}_pilot-{number}"
        also = {"prompts.train": asked.train, "prompts.evaluation": asked.evaluation, "seed": asked.seed}
        also |= {"evaluation.num_images": asked.num_images}
        config = self._budgeted(self._config(heat, name, {**values, **also}, slug), asked.budget, 1, slug)
        return Cell(slug, config, values, name, self.settings.measurement, measured=False)

    def _cell(self, heat: HeatConfig, name: str, values: Keys, seed: int) -> Cell:
        slug = f"{file_name(heat.name)}_{file_name(name)}_seed-{seed}"
        config = self._config(heat, name, {**values, "seed": seed, "evaluation.image_scores": True}, slug)
        config = self._budgeted(config, self.settings.budget, self.settings.evaluations, slug)
        return Cell(slug, config, {**values, "seed": seed}, name, self.settings.measurement)

    def _budgeted(self, config: TrainConfig, budget: int, points: int, slug: str) -> TrainConfig:
        try:
            count = self.counter.iterations(config, budget)
        except EtudeError as error:
            raise EtudeError(f"{self.race.place}, run '{slug}': {error}") from error
        evaluation = config.evaluation.model_copy(update={"every": -(-count // points)})
        return config.model_copy(update={"iterations": count, "evaluation": evaluation})

    def _config(self, heat: HeatConfig, name: str, values: Keys, slug: str) -> TrainConfig:
        settings, method = self.settings, self.settings.methods[name]
        base, place = method.base or settings.base, f"{self.race.place}, run '{slug}'"
        tree = copy.deepcopy(base) if isinstance(base, dict) else read_tree(base)
        layers = settings.overrides, heat.overrides, method.overrides, values
        for key, value in {k: v for layer in layers for k, v in layer.items()}.items():
            set_key(tree, key, copy.deepcopy(value), place)
        tree["rewards"] = dict(heat.weights)
        return parse_config(tree, place)


def choose(results: list[PilotResult | None]) -> int | None:
    """The index of the pilot whose values race: the largest improvement without an excessive fall.

    Where every pilot let a held-out reward fall too far, the one with the smallest excess. None while
    a pilot is not done, and where all failed.
    """
    if any(result is None for result in results):
        return None
    ranked = [(-r.excess, r.improvement, -i) for i, r in enumerate(results) if r is not None and not r.failure]
    return -max(ranked)[2] if ranked else None


def judged(config: TrainConfig) -> str:
    """The reward by which a run is judged: the trained one, or the sum of several."""
    return WEIGHTED_SUM if len(config.rewards) > 1 else next(iter(config.rewards))
