"""Measuring and proving: timing on a GPU, compiling without one, and the `bench` and `check` programs."""
