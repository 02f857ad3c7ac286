"""All measurements, into `RESULTS.md` and `results.svg`: `nox -s bench`, or `python -m bench`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .harness import ROOT, Section
from .plot import svg

SUBJECTS = [
    "steps",
    "sync",
    "checkpoint",
    "goodput",
    "startup",
    "history",
    "many",
    "memory",
    "sharded",
    "render",
    "size",
    "reliability",
]
PACKAGES = [
    "torch",
    "dora-search",
    "hydra-core",
    "flashy",
    "lightning",
    "lightning-fabric",
    "accelerate",
    "torchtnt",
    "pytorch-ignite",
    "cookiecutter",
]


def run(subject: str, quick: bool) -> list[Section]:
    """The results of one subject, which has a process of its own; or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = [sys.executable, "-m", f"bench.{subject}", "--json", str(results)]
        # Imports are measured with bytecode at hand, whatever is set here.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode or not results.exists():
            why = (done.stderr.strip().splitlines() or ["no word"])[-1]
            return [Section(subject, f"Could not be measured: {why}", ("", ""), ("", ""))]
        return [Section.from_dict(found) for found in json.loads(results.read_text())]


def machine() -> str:
    """What it was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    model = models[0] if models else platform.machine()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores ({model}), {gpu}, {platform.system()}{load}"


def versions() -> str:
    """Of all that took part."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package}: **not installed**")
    return ", ".join(found)


def page(sections: list[Section], seconds: float, quick: bool) -> str:
    """The whole text."""
    kind = " Quick run: few rounds, numbers for nobody." if quick else ""
    about = (
        "# Measurements\n\n"
        "Written by `nox -s bench`; `python -m bench.steps` and the like measure one subject, in "
        "an environment with the peers.\n\n"
        "Medians, with quartiles in brackets. All ways of a table take turns, in an order that "
        "changes from round to round, and each is compared with the base of its own round: the "
        f"machine is shared, and now fast, now slow.{kind}\n\n"
        f"- {datetime.date.today():%d %B %Y}, in {seconds / 60:.0f} minutes\n"
        f"- {machine()}\n- {versions()}\n\n"
        "![Bars of the measurements below](results.svg)\n"
    )
    verdicts = [
        row.judged <= row.target
        for s in sections
        for row in s.rows
        if row.target and row.judged is not None
    ]
    about += f"\n{sum(verdicts)} of {len(verdicts)} targets are met.\n"
    return "\n".join([about, *(section.markdown() for section in sections)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--out", type=Path, help="folder of the results; `bench/` unless quick")
    parser.add_argument("subject", nargs="*", help=f"of {', '.join(SUBJECTS)}; all by default")
    args = parser.parse_args()
    out = args.out or (Path(tempfile.mkdtemp(prefix="bench-")) if args.quick else ROOT / "bench")
    out.mkdir(parents=True, exist_ok=True)
    begin, sections = time.monotonic(), []
    for subject in args.subject or SUBJECTS:
        started = time.monotonic()
        found = run(subject, args.quick)
        sections += found
        print("\n".join(section.markdown() for section in found))
        print(f"({subject}: {time.monotonic() - started:.0f} s)\n", flush=True)
    (out / "RESULTS.md").write_text(page(sections, time.monotonic() - begin, args.quick))
    (out / "results.svg").write_text(svg(sections))
    print(f"Results: {out / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
