"""Measurements beside the peers: `nox -s bench`, or one subject, as in `python -m bench.steps`."""
