"""The command line as torchrun starts it: two processes, one training."""

import contextlib
import json
import os
import re
import time

import pytest
import torch
from processes import begun
from ranks import free_ports

from auglocal_ext import data, evaluate, models
from auglocal_ext.cli.program import main
from auglocal_ext.cli.ranks import device_of_rank
from auglocal_ext.optim import cosine

SMALL = ["--data", "fake:60", "--batch-size", "8", "--depth", "2", "--modules", "2"]


def launched(folder, rank, commands):
    """What torchrun sets, then one command after the other; commands: (port, arguments)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    done = []
    for index, (port, arguments) in enumerate(commands):
        os.environ["MASTER_PORT"] = str(port)
        out = folder / f"{rank}.{index}.txt"
        with out.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            began = time.monotonic()
            status = main(arguments)
        done.append((status, time.monotonic() - began))
    (folder / f"{rank}.json").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of each rank: of each command (status, seconds, what it printed)."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [
        ["train", *SMALL, "--epochs", "1", "--runs", str(folder / "runs"), "--name", "a", "--val-split", "0.2"],
        ["resume", str(folder / "runs" / "a"), "--epochs", "2"],
        ["train", *SMALL, "--runs", str(folder / "runs"), "--name", "a"],
        ["train", *SMALL, "--stages", "2", "--epochs", "1", "--runs", str(folder / "parts"), "--name", "b"]
        + ["--val-split", "0.2"],
        ["resume", str(folder / "parts" / "b"), "--epochs", "3", "--max-seconds", "0.001"],
        ["train", *SMALL, "--stages", "3", "--runs", str(folder / "parts")],
    ]
    commands = list(zip(free_ports(len(commands)), commands, strict=True))
    processes = [begun(launched, folder, rank, commands) for rank in range(2)]
    for process in processes:
        process.join(120)
        process.kill()
    done = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    texts = [[(folder / f"{rank}.{index}.txt").read_text() for index in range(len(commands))] for rank in range(2)]
    return folder, [[(*one, text) for one, text in zip(*pair, strict=True)] for pair in zip(done, texts, strict=True)]


def test_one_training_and_one_run(both):
    folder, (first, second) = both
    assert [one[0] for one in first[:2]] == [one[0] for one in second[:2]] == [0, 0]
    assert (
        "1 epoch in batches of 8 by each of 2 ranks, 16 images in a step of the optimizer, sgd with lr 0.0125"
        in (first[0][2])
    )
    assert "epoch 1/1  loss " in first[0][2] and "test accuracy" in first[0][2]
    assert "going on behind epoch 1/2" in first[1][2] and "epoch 2/2" in first[1][2]
    assert second[0][2] == second[1][2] == ""
    assert [path.name for path in (folder / "runs").iterdir()] == ["a"]
    history = json.loads((folder / "runs" / "a" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2]
    models.resnet20().load_state_dict(torch.load(folder / "runs" / "a" / "model.pt"))


def test_what_rank_0_refuses_the_other_one_is_told(both):
    _, (first, second) = both
    assert first[2][0] == second[2][0] == 2 and max(first[2][1], second[2][1]) < 10
    assert first[2][2].endswith("a exists already: choose another --name\n")
    assert second[2][2].startswith("auglocal: error: rank 0 stopped: ValueError: ")
    assert second[2][2].endswith("a exists already: choose another --name\n")


def test_one_model_in_parts(both):
    folder, (first, second) = both
    assert [one[0] for one in first[3:5]] == [one[0] for one in second[3:5]] == [0, 0], (first, second)
    begun, gone_on = first[3][2], first[4][2]
    assert "1 epoch in batches of 8, sgd with lr 0.00625" in begun
    assert "rank 0: local modules 0 to 0; rank 1: local modules 1 to 1" in begun
    assert "epoch 1/1  loss " in begun and "on each rank, planned: " in begun
    assert re.search(
        r": validation accuracy \S+%, test accuracy \S+% after 1 epoch in .* --epochs N` goes on", begun, re.S
    )
    assert "going on behind epoch 1/3, from " in gone_on and "epoch 2/3  loss " in gone_on
    assert "% after 2 epochs, stopped by --max-seconds, in " in gone_on
    assert second[3][2] == second[4][2] == ""
    run = folder / "parts" / "b"
    history = json.loads((run / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2] and history[1]["val_accuracy"] is not None
    assert {path.name for path in run.iterdir()} == {
        *("model.pt", "settings.json", "history.json", "history.csv", "learning_curve.png", "checkpoint"),
    }
    model, found = models.resnet20(), re.search(r"test accuracy (\S+%) after 2", gone_on)[1]
    model.load_state_dict(torch.load(run / "model.pt"))
    assert f"{evaluate(model, data.load('fake:60', 8).test):.2%}" == found


def test_one_process_goes_on_with_a_run_of_two(both, capsys):
    """By the learning rate that the run was begun with."""
    run = both[0] / "runs" / "a"
    with pytest.warns(UserWarning, match="has a training by 2 ranks, which goes on with 1: learning rates are by the "):
        assert main(["resume", str(run), "--epochs", "3", "--quiet"]) == 0
    history = json.loads((run / "history.json").read_text())
    # Of 60 images 12 are held out; the last step's place in three epochs.
    first, last = (cosine(epoch + 1 - 1 / steps, epochs) for epoch, steps, epochs in ((1, 3, 2), (2, 6, 3)))
    assert [entry["lr"] for entry in history[1:]] == pytest.approx([0.0125 * first, 0.0125 * last])


def test_stages_that_do_not_divide_the_processes(both):
    for rank in both[1]:
        status, _, text = rank[5]
        assert status == 2 and "--stages must be a whole number that divides the number of ranks, 2, given 3" in text


def test_a_budget_does_not_go_with_stages(capsys):
    assert main(["train", *SMALL, "--stages", "1", "--budget", "1GB"]) == 2
    assert "error: --budget does not go with --stages yet: leave one of them out" in capsys.readouterr().err


def test_a_rank_has_the_gpu_of_its_number(monkeypatch):
    assert device_of_rank("cuda") == "cuda" and device_of_rank("cpu") == "cpu"
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert [device_of_rank(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
