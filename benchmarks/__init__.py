"""Benchmarks: ratios measured within one run, by one command: `python -m benchmarks`. See docs/benchmarks.md."""
