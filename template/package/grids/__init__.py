"""Dora grids: files here with an `explorer`, run by `dora grid <name>`."""
