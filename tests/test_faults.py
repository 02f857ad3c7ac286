"""Each fault befalls a real run once, and each entry of the state is left out once.

`nox -s faults` goes on with many more faults.
"""

import pytest

from . import controls, damage, faults
from .conftest import Copy


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, copy: Copy) -> faults.Campaign:
    folder = tmp_path_factory.mktemp("faults")
    return faults.Campaign(copy(folder), folder / "runs")


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
    result = campaign.attempt(fault)
    assert result.outcome in faults.FAULTS[fault], result.said


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_the_loss_of_an_entry_is_noticed(campaign: faults.Campaign, control: str) -> None:
    assert controls.notices(campaign, control)


def test_no_damaged_file_is_lost_silently() -> None:
    found = damage.campaign(200)
    assert sum(counts.total() for counts in found.values()) == 200
    assert sum(counts[damage.LOST] for counts in found.values()) == 0


def test_nothing_is_noticed_if_nothing_is_lost(campaign: faults.Campaign) -> None:
    assert not controls.notices(campaign, "")
