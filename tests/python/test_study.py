"""The accuracy study: its queue, its intervals, its table and its picture, of records that were made up."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_lines import record


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("study")


def test_the_queue_has_every_row_once_before_any_second_seed(study):
    """But backpropagation's, with which the others are compared."""
    queue = study.runs("imagefolder:x")
    assert len(queue) == len({run.slug for run in queue}) == 34
    assert [(run.rule, run.seed) for run in queue[:2]] == [("bp", 0), ("bp", 1)]
    first = [run for run in queue if run.seed == 0]
    assert queue[:1] + queue[2 : len(first) + 1] == first and len(first) == 14
    assert {(run.rule, run.depth, run.modules) for run in first if run.auxiliary is None} == {
        *(("bp", None, None), ("predsim", None, None), ("infopro", None, None), ("dgl", None, None), ("dgl", None, 4)),
        *(("auglocal", 4, 2), ("auglocal", 4, 4), ("auglocal", 4, None), ("auglocal", 2, None), ("auglocal", 6, None)),
    }
    assert sorted(run.modules for run in first if run.auxiliary == "light") == [2, 3, 4, 8]


def test_a_difference_has_students_interval(study):
    one, other = [93.0, 93.2, 93.4], [92.0, 92.4, 92.2]
    deviation, freedom = study.pooled_deviation([one, other, [50.0]])
    assert freedom == 4 and deviation == pytest.approx(0.2)
    assert study.interval(3, 3, deviation, freedom) == pytest.approx(2.776 * 0.2 * (2 / 3) ** 0.5)
    assert study.pooled_deviation([[1.0], [2.0]]) is None
    assert [study.verdict(*case) for case in [(-0.3, 0.6), (-0.6, 0.7), (-2.0, 0.7), (2.0, 0.7)]] == [
        *("equal", "not decided", "worse", "better")
    ]


def test_the_table_and_the_picture(study, tmp_path, capsys):
    made = [record("bp", 0.90), record("bp", 0.92, seed=1), record("dgl", 0.85, 16)]
    made += [record("auglocal", 0.91, 4, depth=4, modules=4, auxiliary="light"), record("auglocal", 0.89, 13, depth=4)]
    file, picture = tmp_path / "found.jsonl", tmp_path / "study.svg"
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    assert study.main([str(file), "--picture", str(picture)]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    half = 12.706 * statistics.stdev([90, 92]) * 1.5**0.5
    assert lines[2] == ["BP", "1", "1.00", "10 MB", "91.0 ± 1.4", "2", "30", "", "", "93.73", ""]
    made[0]["machine"] = made[0]["machine"] | {"device": "AMD EPYC, 2 threads"}
    assert study._core_minutes(study.queued.rows_of(made[:1])[0]) == 60
    assert lines[3][7:] == [f"-6.00 ± {half:.2f}", "not decided", "86.30", "-7.43"]
    assert lines[4][0] == "AugLocal d=4, light" and lines[4][9:] == ["", ""]
    assert lines[5][9:] == ["93.08", "-0.65"]
    assert "</svg>" in picture.read_text()


def test_with_models_each_row_is_analysed_as_soon_as_it_is_trained(study, tmp_path, monkeypatch):
    """And before them what was stopped after a training; where it fails the queue goes on."""
    file, folder, ran, records = tmp_path / "study.jsonl", tmp_path / "models", [], study.queued.records
    monkeypatch.setattr(study, "QUEUE", [(0, study.BP), (0, study.DGL)])
    machine = records.machine("cpu")
    monkeypatch.setattr(records, "machine", lambda device: machine)

    def run(command, **_):
        ran.append(command)
        if command[1].endswith("train_cifar.py"):
            rule = command[command.index("--rule") + 1]
            records.append(file, record(rule, 0.9) | {"machine": machine})
        return SimpleNamespace(returncode=int(command[1].endswith("study_analysis.py")), stdout="")

    monkeypatch.setattr(study.queued.subprocess, "run", run)
    command = [str(file), "--data", "imagefolder:x"]
    assert study.main([*command, "--models", str(folder)]) == 1
    assert [Path(one[1]).name for one in ran] == ["study_analysis.py", *["train_cifar.py", "study_analysis.py"] * 2]
    assert ran[0][2:] == [*command, "--models", str(folder), "--device", "cpu"]
    assert ran[1][ran[1].index("--save") + 1].startswith(str(folder))
    ran.clear(), file.unlink()
    assert study.main(command) == 0 and [Path(one[1]).name for one in ran] == ["train_cifar.py"] * 2


def test_a_queue_that_is_stopped_in_its_first_training_has_not_failed(study, tmp_path, monkeypatch, capsys):
    file = tmp_path / "study.jsonl"

    def run(command, **_):
        if command[0] == "git":
            return SimpleNamespace(stdout="abc")
        checkpoint = Path(command[command.index("--checkpoint") + 1])
        checkpoint.mkdir(parents=True)
        (checkpoint / "last.pt").touch()
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(study, "QUEUE", [(0, study.BP)])
    monkeypatch.setattr(study.queued.subprocess, "run", run)
    assert study.main([str(file), "--data", "imagefolder:x", "--minutes", "1"]) == 0
    out, err = capsys.readouterr()
    assert "stopped: the time is up" in out and not err
