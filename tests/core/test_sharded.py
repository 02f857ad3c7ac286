"""Sharded checkpoints: whole or absent, verified, and read on any number of ranks."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp

from core import checkpoint, distrib
from core.sharded import prune
from core.tests.processes import on_ranks
from core.writer import wait_for_writes

from ..commands import Command
from ..conftest import ROOT, Copy
from ..faults import Evil, limit_files
from ..gate import Gate
from .test_fsdp import Solver, run


def shards(path: Path) -> Path:
    """Return the folder of the shards of a checkpoint."""
    about: Any = torch.load(path, weights_only=True)["shards"]
    return Path(path.parent / about["folder"])


def flip(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, shutil.rmtree])
def test_damaged_shards_are_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    undisturbed = run(tmp_path / "whole", 3, sharded=True)
    run(tmp_path / "damaged", 2, sharded=True)
    damage(shards(tmp_path / "damaged" / "checkpoint.th"))
    assert run(tmp_path / "damaged", 3, sharded=True) == undisturbed
    assert (tmp_path / "damaged" / "checkpoint.damaged-1.th").exists()


@pytest.mark.parametrize("kind", ["code", "entry"])
def test_no_code_in_the_metadata_is_run(tmp_path: Path, kind: str) -> None:
    run(tmp_path, 1, sharded=True)
    path = tmp_path / "checkpoint.th"
    metadata = shards(path) / ".metadata"
    # PyTorch would unpickle an entry of bytes.
    entry = {"model.0.weight": dcp.BytesStorageMetadata()}
    evil, name = (Evil(tmp_path / "evil"), "mkdir") if kind == "code" else (entry, "BytesStorage")
    metadata.write_bytes(pickle.dumps(evil))
    state = torch.load(path, weights_only=True)
    state["shards"]["files"][".metadata"] = zlib.crc32(metadata.read_bytes())
    torch.save(state, path)
    with pytest.raises(pickle.UnpicklingError, match=f"the metadata of shards has a .*{name}"):
        checkpoint.read(path)
    assert not (tmp_path / "evil").exists()


def test_shards_of_a_file_that_cannot_be_read_now_are_kept(tmp_path: Path) -> None:
    run(tmp_path, 1, sharded=True)
    kept = shards(tmp_path / "checkpoint.th")
    (tmp_path / "shards.old").mkdir()
    (tmp_path / "checkpoint.9.th").mkdir()  # opening it is an OSError
    prune(tmp_path)
    assert (tmp_path / "shards.old").exists()
    (tmp_path / "checkpoint.9.th").rmdir()
    prune(tmp_path)
    assert [*tmp_path.glob("shards.*")] == [kept]


def fill_the_disk_of_rank_1(folder: Path) -> str:
    solver = Solver(folder, 2, sharded=True)
    train = solver.train

    def limited() -> dict[str, float]:
        if distrib.rank() == 1 and solver.epoch == 2:
            wait_for_writes()
            limit_files(100)
        return train()

    solver.train = limited  # type: ignore[method-assign]
    try:
        solver.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nobody noticed"


def test_a_rank_that_cannot_write_is_named_on_all(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "whole", 2, sharded=True)
    for said in on_ranks(fill_the_disk_of_rank_1, tmp_path / "full"):
        assert re.search("the shards of rank 1 could not be saved to .*: .*too large", said), said
    assert len([*tmp_path.glob("full/shards.*")]) == 2
    assert run(tmp_path / "full", 2, sharded=True) == undisturbed
    assert len([*tmp_path.glob("full/shards.*")]) == 2  # without that of the failed save


def spread(project: Path, layers: str) -> None:
    """Put the model of an example under `fully_shard`, as the README says."""
    text = (ROOT / "core" / "README.md").read_text()
    [recipe] = re.findall(r"^### FSDP\n.*?```python\n(.*?)```", text, re.M | re.S)
    (project / "my_research" / "shard.py").write_text(recipe)
    path = project / "my_research" / "solver.py"
    code = path.read_text().replace(
        "from .schema import", "from .shard import shard\nfrom .schema import"
    )
    old = "distrib.broadcast_model(self.model)"
    code = code.replace(old, f"shard(self.model, {layers}, self.device)")
    norm = '"grad_norm": norm'
    whole = '"grad_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm'
    assert norm in code
    assert old not in code
    path.write_text(code.replace(norm, whole))


OPTIONS = {
    "digits": ("self.model.children()", ["data.batch_size=240", "data.limit=5", "optim.ema=0.9"]),
    "text": (
        "self.model.blocks",
        ["data.batch_size=6", "data.updates_per_epoch=5", "data.limit=9"],
    ),
}


@pytest.mark.parametrize("example", OPTIONS)
def test_examples_resume_from_shards_on_any_number_of_ranks(
    example: str, copy: Copy, tmp_path: Path
) -> None:
    project = copy(tmp_path, example=example, tracker="none")
    layers, options = OPTIONS[example]
    spread(project, layers)
    gate = Gate(project)
    train = ["-m", "dora", "run", "epochs=2", "device=cpu", "checkpoint.sharded=true", *options]

    def command(outputs: str, ranks: int = 2) -> Command:
        spread = ["-d", f"--ddp_workers={ranks}"] if ranks > 1 else []
        env = os.environ | {"MY_RESEARCH_DIR": str(tmp_path / outputs)}
        return Command(project, *train[:3], *spread, *train[3:], env=env)

    stopped = command("stopped")
    stopped.until(lambda: gate.reached(2))
    stopped.send(signal.SIGUSR1)
    said = stopped.finish(130)
    assert re.search("Stopped by SIGUSR1 after step . of train in epoch 2", said), said
    gate.open()
    command("whole").finish()
    for ranks in (1, 3):
        shutil.copytree(tmp_path / "stopped", tmp_path / f"on {ranks}")
        command(f"on {ranks}", ranks).finish()
    command("stopped").finish()
    ends = []
    for name in ("whole", "stopped", "on 1", "on 3"):
        [folder] = (tmp_path / name / "xps").iterdir()
        history = json.loads((folder / "history.json").read_text())
        for epoch in history:
            for metrics in epoch.values():
                del metrics["duration"]
        assert len(history) == 2
        assert len([*folder.glob("shards.*")]) == (1 if name == "on 1" else 2)
        ends.append(history)
    assert ends[1] == ends[0]
    assert all(history[0] == ends[0][0] for history in ends)
    ask = f"from my_research.train import load_solver as load; s = load({folder.name!r})"
    env = os.environ | {"MY_RESEARCH_DIR": str(tmp_path / "stopped")}
    code = f"{ask}; print('sum', sum(p.double().sum().item() for p in s.model.parameters()))"
    said = Command(project, "-c", code, env=env).finish()
    assert re.search(r"sum -?\d", said), said
