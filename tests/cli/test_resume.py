"""Runs that are gone on with: what they begin with, what is missing, what ends them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import auglocal_ext
from auglocal_ext import models
from auglocal_ext.cli.errors import run
from auglocal_ext.cli.program import main

pytestmark = pytest.mark.usefixtures("nothing_compared")
SMALL = ["--data", "fake:64", "--image-size", "8", "--batch-size", "16", "--rule", "bp", "--quiet"]


@pytest.fixture
def begin(tmp_path):
    def begin(name, *more):
        return main(["train", *SMALL, "--runs", str(tmp_path), "--name", name, *more]), tmp_path / name

    return begin


def test_weights_are_begun_with_where_there_is_no_checkpoint_yet(begin, tmp_path):
    torch.manual_seed(9)
    torch.save(models.resnet20().state_dict(), tmp_path / "w.pt")
    more = ["--epochs", "1", "--lr", "0", "--weights", str(tmp_path / "w.pt")]
    status, folder = begin("x", *more)
    assert status == 0
    for path in ("checkpoint/last.pt", "checkpoint/best.pt", "history.json", "model.pt"):
        (folder / path).unlink()  # as a kill within the first epoch leaves it
    assert main(["resume", str(folder), "--quiet"]) == 0
    given, found = torch.load(tmp_path / "w.pt"), torch.load(folder / "model.pt")
    assert torch.equal(given["fc.weight"], found["fc.weight"])
    (tmp_path / "w.pt").unlink()  # which the checkpoint has by now
    assert main(["resume", str(folder), "--quiet", "--epochs", "2"]) == 0
    assert len(json.loads((folder / "history.json").read_text())) == 2


def test_a_run_whose_checkpoint_is_gone_is_not_trained_anew(begin, capsys):
    _, folder = begin("x", "--epochs", "1")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "checkpoint" / "last.pt").unlink()
    capsys.readouterr()
    assert main(["resume", str(folder), "--epochs", "2"]) == 2
    assert (
        f"error: {folder} has no checkpoint to go on from, expected {folder}/checkpoint/last.pt: begin a new run"
        in (capsys.readouterr().err)
    )
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of two epochs, to be copied."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", *SMALL, "--runs", str(runs), "--name", "x", "--epochs", "2"]) == 0
    return runs / "x"


@pytest.mark.parametrize("damage", ["{bad", "{}", "[]", None])
def test_the_history_is_the_checkpoints(begun, tmp_path, damage):
    folder = shutil.copytree(begun, tmp_path / "x")
    path = folder / "history.json"
    first = json.loads(path.read_text())
    path.write_text(damage) if damage else path.unlink()
    assert main(["resume", str(folder), "--epochs", "3", "--quiet"]) == 0
    again = json.loads(path.read_text())
    assert again[:2] == first and len(again) == 3


def test_the_best_epochs_weights_can_be_taken(begin, tmp_path, capsys):
    _, folder = begin("x", "--epochs", "1")
    arguments = ["evaluate", str(folder / "checkpoint" / "best.pt"), "--model", "resnet20", "--data", "digits"]
    assert main([*arguments, "--quiet", "--out", str(tmp_path)]) == 0
    assert "360 images: loss " in capsys.readouterr().out


def test_patience_says_how_it_goes_on(begin, capsys):
    begin("x", "--epochs", "4", "--lr", "0", "--patience", "1")
    assert "x --patience N` goes on" in capsys.readouterr().out


def test_sigterm_leaves_a_checkpoint_of_the_last_step(tmp_path):
    command = [sys.executable, "-m", "auglocal_ext", "train", *SMALL, "--epochs", "500", "--runs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(auglocal_ext.__file__).parents[1])}
    process = subprocess.Popen([*command, "--name", "x"], env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "x" / "checkpoint" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "training interrupted after " in err and "Traceback" not in err
    assert torch.load(tmp_path / "x" / "checkpoint" / "last.pt", weights_only=True)["sums"] is not None


def test_warnings_are_a_sentence():
    told, before = [], warnings.formatwarning
    assert run("auglocal", lambda: told.append(warnings.formatwarning("a batch", UserWarning, "run.py", 95)) or 0) == 0
    assert told == ["auglocal: warning: a batch\n"] and warnings.formatwarning is before


def test_resume_tells_what_may_be_set(capsys):
    assert main(["resume", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--epochs" in out and "--patience" in out and "--model" not in out and "--lr" not in out
