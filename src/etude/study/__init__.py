"""Studies: grids of training runs that measure the effect of a setting over seeds."""
