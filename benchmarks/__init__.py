"""The speed targets, measured: trio_dcore beside a raw trio echo and stock ``distributed.core``, in one run.

Run ``python -m benchmarks --help``; README.md says how to read the table.
"""
