.PHONY: test test-all lint bench

# The quick tests.
test:
	python -m pytest

# All tests, with the slow and the distributed ones.
test-all:
	python -m pytest -m ""

lint:
	python -m ruff check .
	python -m ruff format --check .
	python -m mypy

# Lists the measurements; make bench NAME=step repeats one.
bench:
	python -m benchmarks $(NAME)
