"""Benchmarks of deployed models under a pinned protocol, with intervals, that anybody can repeat."""
