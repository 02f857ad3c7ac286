"""The report: what real runs were, in a table and on a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from core import report
from core.report import differences, find_runs, table
from core.tests.test_solver import Solver

pytest.importorskip("plotly")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folder of two runs that really trained."""
    for sig, epochs in (("aaaa1111", 2), ("bbbb2222", 3)):
        solver = Solver(tmp_path / "xps" / sig, epochs=epochs)
        solver.xp.cfg = {
            "epochs": epochs,
            "optim": {"lr": 0.1 * epochs},
            "seed": 0,
            "workers": epochs,
            "dora": {"dir": sig, "exclude": ["work*"]},
        }
        solver.run()
    return tmp_path


def test_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--dir", str(runs)])
    head, *rows, said = capsys.readouterr().out.splitlines()
    assert head.split("  ")[:1] == ["run"]
    assert re.split(r" {2,}", head) == [
        "run",
        "optim.lr",
        "epochs",
        "lowest train.loss",
        "last train.loss",
    ]
    history = json.loads((runs / "xps" / "bbbb2222" / "history.json").read_text())
    losses = [epoch["train"]["loss"] for epoch in history]
    last = f"{min(losses):.4g} {losses[-1]:.4g}".split()
    assert rows[1].split() == ["bbbb2222", "0.30000000000000004", "3/3", *last]
    assert said == f"Curves: {runs / 'report.html'}"


def test_best_is_higher_or_lower_by_name(tmp_path: Path) -> None:
    run = report.Run(tmp_path)
    run.history = [
        {"valid": {"acc": acc, "loss": loss, "bpc": loss}}
        for acc, loss in ((0.1, 3.0), (0.9, 1.0), (0.5, float("nan")))
    ]
    found = {name: run.best(name) for name in run.epochs}
    assert found == {"valid.acc": 0.9, "valid.loss": 1.0, "valid.bpc": 1.0}
    assert run.last("valid.acc") == 0.5
    run.history.append({"valid": {"acc.nonfinite": 3}})
    assert run.last("valid.acc") is None
    run.history.append({"train": {"loss": 1.0}})  # no validation in that epoch
    assert run.last("valid.acc") is None
    higher = ["acc", "acc1", "top5_acc", "valid_accuracy", "mAP", "macro_f1", "mIoU", "psnr_y"]
    higher += ["auc", "auroc", "si_sdr", "sisnr", "mrr", "ndcg@10", "pass@1", "elbo", "top5"]
    higher += ["f1.macro", "bertscore", "log_likelihood", "preferred_acc"]
    lower = ["window_loss", "map_err", "bitmap", "replace", "acc_loss", "wer", "bpc", "error_map"]
    lower += ["brier_score", "nll", "perplexity", "audio", "rr_err", "stop", "top", "acc.nonfinite"]
    lower += ["negative_log_likelihood"]
    for name in higher + lower:
        run = report.Run(tmp_path, [{"valid": {name: value}} for value in (1.0, 2.0)])
        assert run.best(f"valid.{name}") == (2.0 if name in higher else 1.0), name
    assert run.best("test.acc") is None


def test_page_holds_every_curve_and_asks_for_nothing(runs: Path) -> None:
    report.main(["--dir", str(runs), "--out", str(runs / "page.html"), "bbbb2222", "aaaa1111"])
    page = (runs / "page.html").read_text()
    assert len(page) > 1_000_000  # the plotting library is inside
    body = page[page.index("<body>") :]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", body)
    assert [name for name in ("train loss", "train duration (s)") if name in body]
    assert "By step" in body  # the solver logs curves by step
    assert body.index("bbbb2222") < body.index("aaaa1111")
    # Two charts by epoch and one by step, of two runs each.
    assert body.count("Plotly.newPlot(") == 3
    assert body.count('"name":"aaaa1111"') == 3


def test_names_are_escaped(runs: Path) -> None:
    solver = Solver(runs / "xps" / "evil", epochs=1)
    solver.xp.cfg = {"note": "</table><script>alert(1)</script>"}
    solver.run()
    report.main(["--dir", str(runs)])
    assert "<script>alert(1)" not in (runs / "report.html").read_text()


def test_no_two_of_many_runs_look_alike() -> None:
    assert len({report.style(index) for index in range(42)}) == 42


def test_what_is_wrong_is_said_in_a_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: str) -> str:
        with pytest.raises(SystemExit) as error:
            report.main(args)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no run aaaa1112" in (said := refuse("--dir", str(runs), "aaaa1112"))
    assert "did you mean aaaa1111?" in said
    assert "train one with `dora run`" in refuse("--dir", str(tmp_path / "nowhere"))
    (runs / "xps" / "aaaa1111" / "history.json").write_text("[{")
    assert "aaaa1111/history.json can't be read" in refuse("--dir", str(runs))
    assert not (runs / "report.html").exists()
    assert "nowhere" in refuse(
        "--dir", str(runs), "--out", str(tmp_path / "nowhere" / "x"), "bbbb2222"
    )
    monkeypatch.setattr(report, "__package__", "core")
    assert "this core is in no project" in refuse()


def test_a_run_without_checkpoint_is_shown(runs: Path) -> None:
    (runs / "xps" / "aaaa1111" / "checkpoint.th").unlink()
    with (runs / "xps" / "aaaa1111" / "metrics.jsonl").open("a") as file:
        row = '{"stage": "train", "step": 9, "epoch": 1, "loss": 1.0, "p": [1, 2], "word": "a"}'
        file.write(row + '\n{"torn')
    found = find_runs(runs / "xps", [])
    assert differences(found) == []
    assert found[0].steps["train.loss"][9] == 1.0
    assert "train.p" not in found[0].steps  # no number, so no point of a curve
    assert [row[0] for row in table(found, [], [])] == ["run", "aaaa1111", "bbbb2222"]
