"""Studies: grids of training runs that measure the effect of a setting over seeds.

`etude study FILE` runs a study from the command line.
"""

from __future__ import annotations
