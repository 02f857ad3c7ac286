"""Write docs/reliability.md: `nox -s faults`, or `python -m tests.reliability PROJECT FOLDER`.

The numbers of runs, of damaged files and of the seed may follow. A large campaign takes several
sittings, each with a seed of its own: the folder keeps their results, and the page has all.
"""

import datetime
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from . import controls, damage, faults
from .blocks import DOCS
from .conftest import ROOT

PAGE = Template((ROOT / "tests" / "reliability.md").read_text())


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that this part of all values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def sit(project: Path, runs: int, files: int, seed: int) -> dict[str, Any]:
    """Break so many runs, damage so many files, leave out each entry; return what was found."""
    begin = time.monotonic()
    campaign = faults.Campaign(project, project.parent / "runs", seed)
    results = faults.break_runs(campaign, runs)
    found = damage.campaign(files, seed)
    missed = [name for name in controls.CONTROLS if not controls.notices(campaign, name)]
    minutes = round((time.monotonic() - begin) / 60)
    about = {"seed": seed, "date": datetime.date.today().isoformat(), "minutes": minutes}
    return about | {"runs": [*map(vars, results)], "files": found, "missed": missed}


def main(
    project: str, folder: str, runs: str = "200", files: str = "2000", seed: str = "0"
) -> None:
    """Hold a sitting of a campaign, keep its results in a folder, and write the page from all."""
    new = sit(Path(project), int(runs), int(files), int(seed))
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{seed}.json").write_text(json.dumps(new))
    sittings = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    results = [faults.Result(**result) for sitting in sittings for result in sitting["runs"]]
    days = sorted(sitting["date"] for sitting in sittings)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for sitting in sittings:
        for name, counts in sitting["files"].items():
            found[name] += Counter(counts)
    killed = [result for result in results if "kill" in result.fault]
    repeated, seconds = ([getattr(r, name) for r in killed] for name in ("repeated", "seconds"))
    page = PAGE.substitute(
        runs=len(results),
        files=sum(counts.total() for counts in found.values()),
        seeds=", ".join(str(sitting["seed"]) for sitting in sittings),
        dates=" to ".join(dict.fromkeys((days[0], days[-1]))),
        minutes=sum(sitting["minutes"] for sitting in sittings),
        cores=os.cpu_count(),
        broken=faults.table(results),
        repeated=quantile(repeated, 0.5),
        most_repeated=quantile(repeated, 0.99),
        seconds=f"{quantile(seconds, 0.5):.1f}",
        most_seconds=f"{quantile(seconds, 0.99):.1f}",
        damaged=damage.table(found),
        controls=len(controls.CONTROLS),
    )
    (DOCS / "reliability.md").write_text(page)
    lost = sum(result.outcome == faults.LOST for result in results)
    lost += sum(counts[damage.LOST] for counts in found.values())
    missed = new["missed"]
    sys.exit(f"lost silently: {lost}; not noticed: {missed}" if lost or missed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
