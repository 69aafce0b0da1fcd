"""Grids of runs: what a setting does, measured over seeds. `etude study FILE` is this package on the command line."""

from __future__ import annotations
