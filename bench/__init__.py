"""Benchmarks: ratios of things measured in turn in one run, on whatever machine this is."""
