"""Each fault befalls a real run once; `nox -s faults` goes on for hours."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import faults
from .conftest import clean_environment, cookiecutter


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[faults.Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    rendered = cookiecutter(template, folder / "out", clean_environment(folder))
    assert rendered.returncode == 0, rendered.stderr
    project = folder / "out" / "my-research"
    faults.augment(project)
    campaign = faults.Campaign(project, folder / "runs")
    yield campaign
    print(campaign.report())


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_nothing_is_lost_silently(campaign: faults.Campaign, fault: faults.Fault) -> None:
    assert campaign.attempt(fault) in faults.FAULTS[fault]
