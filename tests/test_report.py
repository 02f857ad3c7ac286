"""The report: runs, as their files tell, in a table, as JSON and on a page."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from template.package.tools import report
from template.package.tools import runs as files

from .conftest import ROOT, Copy

LR = 0.30000000000000004


def add_run(runs: Path, sig: str, history: list[Any], **config: Any) -> Path:
    """Write the files that a run has, with a point of a curve for each epoch."""
    folder = runs / "xps" / sig
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "history.json").write_text(json.dumps(history))
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, stages in enumerate(history, 1):
            for stage, metrics in stages.items():
                row = {"stage": stage, "epoch": epoch, "metrics": metrics}
                point = row | {"step": 10 * epoch, "metrics": {"loss": 1 / epoch}}
                file.write(f"{json.dumps(point)}\n{json.dumps(row)}\n")
    code = {"commit": f"{sig}0000", "changes": ""}
    start = {"time": "2026-11-29T12:00:00+01:00", "command": "dora <run>", "code": code}
    (folder / "run.json").write_text(json.dumps([start]))
    return folder


def epoch(loss: Any, acc: float = 0.5) -> dict[str, Any]:
    metrics = {"loss": loss, "acc": acc, "duration": 1.5}
    return {"train": {"loss": loss, "duration": 2.5}, "valid": metrics}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of two runs."""
    dora = {"dir": "outputs", "exclude": ["work*"]}
    first, second = [epoch(3.0), epoch(1.0, 0.9)], [epoch(2.0, 0.1), epoch(4.0), epoch(2.5, 0.7)]
    add_run(tmp_path, "aaaa1111", first, epochs=2, optim={"lr": 0.1}, seed=0, workers=1, dora=dora)
    add_run(tmp_path, "bbbb2222", second, epochs=4, optim={"lr": LR}, seed=0, workers=2, dora=dora)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run the command; return the lines of its output, of which none is for errors."""
    report.main(arguments)
    output, errors = capsys.readouterr()
    assert errors == ""
    return output.splitlines()


def test_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, below, *rows, end = said(capsys, "--dir", str(runs))
    assert head.split() == ["run", "optim.lr", "epochs", "valid.loss", "valid.acc"]
    assert below.split() == ["min", "max", "last"] * 2
    assert head.index("valid.acc") == [m.start() for m in re.finditer("min", below)][1]
    assert rows[0].split() == ["aaaa1111", "0.1", "2/2", "1", "3", "1", "0.5", "0.9", "0.9"]
    assert rows[1].split() == ["bbbb2222", str(LR), "3/4", "2", "4", "2.5", "0.1", "0.7", "0.7"]
    assert str(runs / "report.html") in end


def test_chosen_metrics(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = [epoch(1.0), {"test": {"frechet": 7.0}}]
    add_run(runs, "cccc3333", history, epochs=1, optim={"lr": 0.1}, seed=0)
    head, _, *rows, _ = said(capsys, "--dir", str(runs))
    assert head.split()[-3:] == ["test.frechet", "valid.loss", "valid.acc"]
    assert rows[-1].split()[2] == "1/1", "a test is no epoch of training"
    chosen = "--metrics", "train.loss", "test.*"
    head, _, *rows, _ = said(capsys, "--dir", str(runs), *chosen)
    assert head.split()[-2:] == ["train.loss", "test.frechet"]
    assert rows[-1].split()[-6:] == ["1", "1", "1", "7", "7", "7"]
    page = (runs / "report.html").read_text()
    assert '<th colspan="3">test.frechet</th>' in page
    with pytest.raises(
        SystemExit, match=r"no metric is called test\.fid; there are .*test\.frechet"
    ):
        report.main(["--dir", str(runs), "--metrics", "test.fid"])


def test_tags_and_notes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"epochs": 2, "optim": {"lr": 0.1}, "seed": 0, "workers": 1}
    add_run(runs, "cccc3333", [epoch(1.0)], tags=["debug"], **about)
    add_run(runs, "dddd4444", [epoch(1.0)], tags=["paper", "old"], note="for Fig. 2", **about)
    head, _, *rows, _ = said(capsys, "--dir", str(runs))
    assert "1 debug run is left out: see --tag debug" in head
    assert [row.split()[0] for row in rows[1:]] == ["aaaa1111", "bbbb2222", "dddd4444"]
    assert "paper old" in rows[-1]
    assert "for Fig. 2" in rows[-1]
    for arguments in (["--tag", "debug"], ["cccc3333"]):
        *_, row, _ = said(capsys, "--dir", str(runs), *arguments)
        assert row.startswith("cccc3333")
    found = json.loads("\n".join(said(capsys, "--dir", str(runs), "--json", "--tag", "paper")))
    assert [run["sig"] for run in found] == ["dddd4444"]
    with pytest.raises(SystemExit, match="no run has the tag papers"):
        report.main(["--dir", str(runs), "--tag", "papers"])


def test_the_page_shows_the_newest_images_and_sounds(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = runs / "xps" / "aaaa1111" / "outputs"
    for name in (
        "valid_9/wrong.png",
        "valid_10/wrong.png",
        "valid_10/deep/said.wav",
        "train_2/a.txt",
    ):
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_bytes(name.encode())
    (outputs / "valid_10" / "huge.png").write_bytes(bytes(2**21))
    said(capsys, "--dir", str(runs))
    media = (runs / "report.html").read_text().partition("<h2>Media</h2>")[2]
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", media)
    assert shown == ["aaaa1111: valid_10/deep/said.wav", "aaaa1111: valid_10/wrong.png"]
    [data] = re.findall(r'src="data:image/png;base64,(.*?)"', media)
    assert base64.b64decode(data) == b"valid_10/wrong.png"


def test_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads("\n".join(said(capsys, "--dir", str(runs), "--json", "bbbb2222")))
    assert [run["sig"] for run in found] == ["bbbb2222"]
    assert found[0]["folder"] == str(runs / "xps" / "bbbb2222")
    assert found[0]["epochs"] == 3
    assert found[0]["config"]["optim"] == {"lr": LR}
    assert found[0]["metrics"]["valid.loss"] == {"min": 2.0, "max": 4.0, "last": 2.5}
    assert found[0]["metrics"].keys() >= {"train.loss", "valid.acc", "valid.duration"}
    assert found[0]["starts"][0]["code"]["commit"] == "bbbb22220000"
    assert not (runs / "report.html").exists()


def test_a_run_before_its_first_commit_is_shown(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add_run(runs, "cccc3333", [], epochs=9, optim={"lr": 0.2}, seed=0)
    (folder / "history.json").unlink()
    row = {"stage": "train", "epoch": 1, "step": 10, "metrics": {"loss": 0.125}}
    (folder / "metrics.jsonl").write_text(json.dumps(row))
    *_, last, _ = said(capsys, "--dir", str(runs), "aaaa1111", "cccc3333")
    assert last.split() == ["cccc3333", "0.2", "0/9", *"------"]
    assert "0.125" in (runs / "report.html").read_text().rpartition("By step")[2]


def test_values_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = [epoch(2.0), epoch(float("nan")), epoch([1, 2]), epoch("low")]
    add_run(tmp_path, "a", history)
    loss = {"min": 2.0, "max": 2.0, "last": None}
    output = "\n".join(said(capsys, "--dir", str(tmp_path), "--json"))
    assert json.loads(output, parse_constant=pytest.fail)[0]["metrics"]["valid.loss"] == loss
    add_run(tmp_path, "b", [*history, epoch(3.0), {"train": {"loss": 1.0}}])
    *_, row, _ = said(capsys, "--dir", str(tmp_path), "b")
    assert row.split()[:5] == ["b", "6", "2", "3", "3"], "the last epoch had no validation"


def test_page_holds_every_curve_and_asks_for_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "--dir", str(runs), "--out", str(runs / "page.html"), "bbbb2222", "aaaa1111")
    page = (runs / "page.html").read_text()
    assert len(page) > 1_000_000  # the plotting library is inside
    body = page[page.index("<body>") :]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", body)
    assert all(name in body for name in ("train loss", "train duration (s)", "By step"))
    assert body.index("bbbb2222") < body.index("aaaa1111")
    # Five charts by epoch and two by step, of two runs each.
    assert body.count("Plotly.newPlot(") == 7
    assert body.count('"name":"aaaa1111"') == 7
    assert "<td>aaaa11110000</td>" in body
    assert "<td>dora &lt;run&gt;</td>" in body
    assert not re.search(r"\$\w", body[: body.index("<script")]), "a place was not filled in"


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</table></script><script>alert(1)</script>"
    line = "red\x1b[31m\nsecond"
    for sig, note in (("evil", evil), ("line", line)):
        add_run(tmp_path, sig, [{"valid": {evil: 1.0}}], **{evil: note, "b": note})
    *rows, _ = said(capsys, "--dir", str(tmp_path))
    assert len(rows) == 4
    assert "\x1b" not in "".join(rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page


def test_no_two_of_many_runs_look_alike() -> None:
    assert len({report.style(index) for index in range(42)}) == 42


def damage_byte(data: bytes) -> bytes:
    return data[:5] + b"\xff" + data[6:]


def tear(data: bytes) -> bytes:
    return data + data[:20]


def misshape(data: bytes) -> bytes:
    rows: list[Any] = [[], 1, {"stage": "a", "metrics": 1}, {"stage": [], "metrics": {"a": 1}}]
    rows += [{"stage": "a", "step": "b", "metrics": {"a": 1}}]
    return b"\n".join([*(json.dumps(row).encode() for row in rows), b"[" * 10**5, data])


@pytest.mark.parametrize("damage", [damage_byte, tear, misshape])
def test_damage_costs_the_damaged_rows(
    damage: Any, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [run.steps for run in files.find_runs(runs / "xps", [])]
    path = runs / "xps" / "aaaa1111" / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    report.main(["--dir", str(runs)])
    output, errors = capsys.readouterr()
    [line] = errors.splitlines()
    assert str(path) in line
    assert "bbbb2222" in output
    found = [run.steps for run in files.find_runs(runs / "xps", [])]
    assert found[1] == whole[1]
    lost = {"train.loss": {20: 0.5}} if damage is damage_byte else {}
    assert found[0] == whole[0] | lost


@pytest.mark.parametrize("exclude", [3, None, "epochs", {"a": 1}, [3, None]])
def test_a_strange_config_is_shown(
    exclude: Any, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "xps" / "aaaa1111" / "config.json"
    path.write_text(json.dumps({"dora": {"exclude": exclude}, "epochs": {"many": []}}))
    assert "aaaa1111" in "\n".join(said(capsys, "--dir", str(runs)))


@pytest.mark.parametrize("name", ["config.json", "history.json", "metrics.jsonl", "", "../file"])
def test_folders_and_files_in_each_others_place(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "xps" / "aaaa1111" / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    report.main(["--dir", str(runs)])
    output, errors = capsys.readouterr()
    assert "bbbb2222" in output
    assert len(errors.splitlines()) <= 1


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_any_locale_will_do(env: dict[str, str], tmp_path: Path) -> None:
    add_run(tmp_path, "cccc3333", [{"valid": {"l\u00f6ss": 1.0}}], city="Z\u00fcrich")
    add_run(tmp_path, "dddd\u00e9", [epoch(1.0)], city="Gen\u00e8ve")
    command = [sys.executable, "-m", "template.package.tools.report", "--dir", str(tmp_path)]
    full = os.environ | {"PYTHONCOERCECLOCALE": "0"} | env
    done = subprocess.run(command, cwd=ROOT, env=full, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Z\u00fcrich" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["config.json", "history.json", "run.json"])
@pytest.mark.parametrize("text", ["[{", "null", "3", "[1]", '[{"train": 1}]', '"\ud800"', "["])
def test_a_damaged_file_costs_its_own_contents(
    name: str, text: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "xps" / "aaaa1111" / name
    whole = name == "run.json" and text == '[{"train": 1}]'
    path.write_bytes(text.encode(errors="surrogatepass"))
    report.main(["--dir", str(runs)])
    output, errors = capsys.readouterr()
    [line] = [str(path)] if whole else errors.splitlines()
    assert str(path) in line
    assert "aaaa1111" in output
    assert "bbbb2222" in output


def test_a_file_that_cannot_be_read_costs_itself(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "xps" / "aaaa1111" / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    report.main(["--dir", str(runs)])
    output, errors = capsys.readouterr()
    assert str(path) in errors
    assert "aaaa1111  0.1" in output


def test_a_run_without_config_is_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sig in ("aaaa1111", "bbbb2222"):
        (runs / "xps" / sig / "config.json").unlink()
    head, _, row, *_ = said(capsys, "--dir", str(runs))
    assert head.split()[:2] == ["run", "epochs"]
    assert row.split()[:2] == ["aaaa1111", "2"]


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["--dir", "{runs}", "aaaa1112"], ["aaaa1112", "aaaa1111"]),
        (["--dir", "{runs}/nowhere"], ["{runs}/nowhere"]),
        (["--dir", "{runs}", "--out", "{runs}/nowhere/x", "bbbb2222"], ["{runs}/nowhere"]),
    ],
)
def test_a_mistake_is_named_in_one_line(
    arguments: Sequence[str], culprits: Sequence[str], runs: Path
) -> None:
    with pytest.raises(SystemExit) as error:
        report.main([argument.format(runs=runs) for argument in arguments])
    assert "\n" not in str(error.value)
    assert all(culprit.format(runs=runs) in str(error.value) for culprit in culprits)


def test_a_project_knows_its_runs(copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, example="basic")
    add_run(project / "outputs", "cccc3333", [epoch(1.0)], epochs=1)
    command = [sys.executable, "-m", "my_research.tools.report"]
    for options in ([], ["--json"]):
        done = subprocess.run([*command, *options], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cccc3333" in done.stdout
    assert (project / "outputs" / "report.html").exists()
