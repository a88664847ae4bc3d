"""What every claim about speed and memory was measured with: ``python -m benchmarks`` lists and runs them.

Each measures this project beside the plain way of doing the same (``reference.py``), in one run and interleaved, so
that a busy or throttled machine is unfair to both alike.
"""
