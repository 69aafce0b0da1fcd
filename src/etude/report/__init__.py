"""The page that a run leaves behind. Plotting and templating are imported when a report is written, not before."""

from __future__ import annotations

from etude.report.page import write_report

__all__ = ["write_report"]
