"""Ranks that disagree, leave or die: real processes, and what the others say."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

from .. import distrib
from ..distrib import board
from .processes import on_ranks


def _train(model: nn.Module) -> None:
    with distrib.eager_sync_model(model):
        model(torch.ones(2, 3)).sum().backward()


def _go_wrong(how: str) -> str:
    """What this rank is told of the mistake of rank one."""
    wrong = distrib.rank() == 1
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    _train(model)
    try:
        if how == "calls something else":
            distrib.broadcast_object(1) if wrong else distrib.average_metrics({"x": 1})
        elif how == "has a batch less":
            if not wrong:
                _train(model)
            distrib.average_metrics({"x": 1})
        elif how == "has another parameter":
            if wrong:
                model[0].bias.requires_grad_(False)
            _train(model)
        elif how == "has ended":
            if not wrong:
                _train(model)
        elif how == "has failed":
            if wrong:
                raise ValueError("mine")
            _train(model)
        elif how == "was killed":
            if wrong:
                os.kill(os.getpid(), signal.SIGKILL)
            _train(model)
        elif how == "is slow":
            if wrong:
                time.sleep(2.5 * board.SECONDS)
            _train(model)
            distrib.barrier()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("calls something else", "rank 1 in broadcast_object from rank 0"),
        (
            "has a batch less",
            "rank 0 is in sync_gradients of 4 parameters; rank 1 in average_metrics",
        ),
        (
            "has another parameter",
            "in sync_gradients of 4 parameters; rank 1 in sync_gradients for the first time",
        ),
        ("has ended", "no word from rank 1, which ended or hangs"),
        ("has failed", "no word from rank 1, which ended or hangs"),
        ("was killed", "no word from rank 1, which ended or hangs"),
        ("is slow", "no error"),
    ],
)
def test_nobody_hangs_when_rank_one(how: str, told: str) -> None:
    zero, one = on_ranks(_go_wrong, how)
    assert told in zero
    # What a rank waits for until it says so, and for the others' word: less than ten seconds.
    assert 2.5 * board.SECONDS < 10
    if "rank 1 in" in zero:  # both are told
        assert one.startswith("ranks disagree: rank 1 is in ")


def test_a_collective_that_ends_just_after_the_time_is_up_has_not_failed() -> None:
    class Late:
        """No two ranks can be made to meet in this moment."""

        waited = 0

        def wait(self, timeout: Any) -> None:
            self.waited += 1
            if self.waited == 1:
                raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return self.waited > 0

    late = Late()
    board.wait(late, torch.ones(1), "all_reduce")
    assert late.waited == 2
