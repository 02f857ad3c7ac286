"""How long a training loop waits for a checkpoint, as a part of a plain `torch.save`.

Both write the same state, in turn, to the same disk: `python -m bench.checkpoint [megabytes]`.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from core import BaseSolver


class Solver(BaseSolver):
    """Has nothing but a state of some size."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        super().__init__(folder)
        self.weights = {str(i): torch.randn(2**18) for i in range(megabytes)}
        self.register_stateful("weights")


def main(megabytes: int = 300, rounds: int = 9) -> None:
    """Print the median times, and their ratio."""
    torch.set_num_threads(1)
    plain, waited = [], []
    with tempfile.TemporaryDirectory() as folder:
        solver = Solver(Path(folder), megabytes)
        for _ in range(rounds):
            begin = time.perf_counter()
            torch.save(solver.weights, Path(folder, "plain.th"))
            plain.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            solver.commit()
            waited.append(time.perf_counter() - begin)
            solver.wait()
    first, rest = waited[0], statistics.median(waited[1:])
    usual = statistics.median(plain)
    print(f"torch.save of {megabytes} MiB: {usual:.3f} s")
    print(f"commit, the first: {first:.3f} s, {first / usual:.2f} of that")
    print(f"commit, later: {rest:.3f} s, {rest / usual:.2f} of that")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
