"""Each fault befalls a real run once; `nox -s faults` goes on for hours."""

from collections.abc import Iterator

import pytest

from . import faults
from .conftest import Copy


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, copy: Copy) -> Iterator[faults.Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    project = copy(folder)
    faults.augment(project)
    campaign = faults.Campaign(project, folder / "runs")
    yield campaign
    print(campaign.report())


# Killed, asked to stop within an epoch, and with a damaged checkpoint.
PROMISES = (faults.kills_at_random, faults.terminated_at_random, faults.bit_flipped)
PARAMETERS = [
    pytest.param(fault, marks=pytest.mark.promise if fault in PROMISES else (), id=fault.__name__)
    for fault in faults.FAULTS
]


@pytest.mark.parametrize("fault", PARAMETERS)
def test_nothing_is_lost_silently(campaign: faults.Campaign, fault: faults.Fault) -> None:
    assert campaign.attempt(fault) in faults.FAULTS[fault]
