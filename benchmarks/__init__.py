"""Benchmarks: ratios measured within one run of `python -m benchmarks`. See docs/benchmarks.md."""
