"""The parts of `tests/bench/exactness.py`."""
