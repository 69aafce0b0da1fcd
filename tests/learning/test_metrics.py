"""The words of a metric stand once: the page on metrics repeats its declaration."""

from __future__ import annotations

from pathlib import Path

import pytest

from etude.learning.metrics import metrics_of
from etude.registry import OBJECTIVES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "read-metrics.md"


@pytest.mark.parametrize("objective", OBJECTIVES.builtin)
def test_the_page_on_metrics_says_what_each_metric_declares(objective: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    logged = [metric for metric in metrics_of(objective) if metric.logged]
    assert len(logged) >= 3
    for metric in logged:
        act = f" {metric.act} |" if metric.act else " |"
        assert f"| `{metric.name}` | {metric.note} |{act}" in page
