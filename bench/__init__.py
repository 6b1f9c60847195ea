"""Measuring and proving: timing on a GPU, compiling without one, and the `bench` and `check` programs.

Three floors over one ground. What stands further down may import what stands above it (tests/test_bench.py):

    calls/      one description of a call of an op, the lists of them, who computes them
    tables.py   tables and files that grow; recording.py, ahead.py: compiling without a GPU, and before a launch
    static/     what the compiler made of a call
    check/      whether its values are right
    speed/      how long it takes; `bench`, which runs static/ too
"""
