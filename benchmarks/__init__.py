"""The measurements behind all claims of speed and memory: ``python -m benchmarks`` lists and runs them.

Each compares this project with a plain implementation (``reference.py``), interleaved in one run, so that a busy or
throttled machine affects both equally.
"""
