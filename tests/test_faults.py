"""Each fault befalls a real run once; `nox -s faults` goes on with 200 of them."""

from collections.abc import Iterator

import pytest

from . import faults
from .conftest import Copy


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, copy: Copy) -> Iterator[faults.Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    project = copy(folder)
    campaign = faults.Campaign(project, folder / "runs")
    yield campaign
    print(campaign.report())


PARAMETERS = [
    pytest.param(
        fault,
        marks=pytest.mark.promise if fault is faults.bit_flipped else (),
        id=fault.__name__,
    )
    for fault in faults.FAULTS
]


@pytest.mark.parametrize("fault", PARAMETERS)
def test_nothing_is_lost_silently(campaign: faults.Campaign, fault: faults.Fault) -> None:
    assert campaign.attempt(fault) in faults.FAULTS[fault]
