"""The report of a run. Plotting and templating are imported only when a report is written."""

from __future__ import annotations

from etude.report.page import write_report

__all__ = ["write_report"]
