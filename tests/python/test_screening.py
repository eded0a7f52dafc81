"""The screening of auxiliary nets: its queue, its table and its picture, of records that were made up."""

import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def screening(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("screening")


def record(rule, accuracy, macs=1.0, modules=1, seed=0, **more):
    settings = {"dataset": "cifar10", "data": "imagefolder:x", "model": "resnet20", "rule": rule, "depth": None}
    settings |= {"modules": None, "epochs": 8, "batch_size": 128, "precision": "bf16", "seed": seed, **more}
    settings["train_images"] = 20_000
    made = {"settings": settings, "machine": {"device": "one"}, "local_modules": modules, "macs_per_bp": macs}
    return made | {"accuracy": {"last": accuracy, "best": accuracy}, "seconds": 1, "peak_bytes": 10**7 // modules}


def test_the_table_and_the_picture(screening, tmp_path, capsys):
    made = [record("bp", 0.75), record("bp", 0.73, seed=1), record("dgl", 0.7, 0.95, 4)]
    made += [record("auglocal", 0.72, 1.1, 4, depth=4, auxiliary="light"), record("auglocal", 0.74, 1.7, 4, depth=4)]
    file, picture = tmp_path / "found.jsonl", tmp_path / "front.svg"
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    assert screening.main([str(file), "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("resnet20", "BP", "1", "1.00", "10 MB", "74.0 ± 1.4", "2")
    ]
    assert "AugLocal d=4, light" in lines[4] and "AugLocal d=4, paper" in lines[5]
    assert "multiply-accumulates / BP" in picture.read_text() or "</svg>" in picture.read_text()
    assert screening.main([str(tmp_path / "none.jsonl")]) == 2
    assert "no records in" in capsys.readouterr().err


def test_every_run_of_the_queue_can_be_told_apart(screening):
    queue = screening.runs("imagefolder:x")
    assert len(queue) == len({run.slug for run in queue}) >= 40
    command = queue[1].command("cpu", "results", "checkpoint", 60)
    assert command[command.index("--auxiliary") + 1] == "light" and "--auxiliary" not in queue[0].command(
        "cpu", "", "", 1
    )
