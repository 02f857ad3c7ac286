"""Write docs/reliability.md: `nox -s faults`, or `python -m tests.reliability PROJECT`.

The numbers of runs, of damaged files and of the seed may follow.
"""

import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from . import controls, damage, faults
from .blocks import DOCS
from .conftest import ROOT

PAGE = Template((ROOT / "tests" / "reliability.md").read_text())


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that this part of all values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main(project: str, runs: str = "200", files: str = "2000", seed: str = "0") -> None:
    """Break so many runs, damage so many files, leave out each entry, and write the page."""
    begin = time.monotonic()
    campaign = faults.Campaign(Path(project), Path(project).parent / "runs", int(seed))
    results = faults.break_runs(campaign, int(runs))
    found = damage.campaign(int(files), int(seed))
    missed = [name for name in controls.CONTROLS if not controls.notices(campaign, name)]
    killed = [result for result in results if "kill" in result.fault]
    repeated, seconds = ([getattr(r, name) for r in killed] for name in ("repeated", "seconds"))
    page = PAGE.substitute(
        runs=len(results),
        files=files,
        seed=seed,
        date=f"{datetime.date.today():%-d %B %Y}",
        minutes=round((time.monotonic() - begin) / 60),
        cores=os.cpu_count(),
        broken=faults.table(results),
        repeated=quantile(repeated, 0.5),
        most_repeated=quantile(repeated, 0.99),
        seconds=f"{quantile(seconds, 0.5):.1f}",
        most_seconds=f"{quantile(seconds, 0.99):.1f}",
        damaged=damage.table(found),
        controls=", ".join(name.removeprefix("checkpoint.") for name in controls.CONTROLS),
    )
    (DOCS / "reliability.md").write_text(page)
    lost = sum(result.outcome == faults.LOST for result in results)
    lost += sum(counts[damage.LOST] for counts in found.values())
    sys.exit(f"lost silently: {lost}; not noticed: {missed}" if lost or missed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
