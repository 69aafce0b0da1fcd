"""The report of a run. Plotting and templating are imported only when a report is written."""

from etude.report.page import write_report as write_report
