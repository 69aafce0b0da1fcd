"""The findings of `etude doctor`, which `etude watch` and the report show in the same words."""

from __future__ import annotations

from dataclasses import dataclass

from etude.report.illnesses import ILLNESSES, Illness
from etude.runs.reader import Run


@dataclass(frozen=True)
class Finding:
    """An illness that a run has, with the figure that shows it."""

    illness: Illness
    figure: str

    @property
    def sentence(self) -> str:
        """The sentence on the illness, with the figure."""
        return self.illness.sentence.format(figure=self.figure)

    def __str__(self) -> str:
        return f"{self.illness.name}: {self.sentence} {self.illness.remedy}"


def examine(run: Run) -> list[Finding]:
    """The illnesses that a run's metrics show, in the order of `ILLNESSES`."""
    figures = ((illness, illness.test(run)) for illness in ILLNESSES)
    return [Finding(illness, figure) for illness, figure in figures if figure is not None]


def clean_bill(run: Run) -> str:
    """The sentence for a run without a finding: what was looked at, and for what."""
    looked = (
        f"{max((row['iteration'] for row in run.rows), default=0)} iterations and {len(run.evaluations)} evaluations"
    )
    return f"No illness found in {looked}; looked for: {', '.join(illness.name for illness in ILLNESSES)}."
