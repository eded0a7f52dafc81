"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import auglocal_ext
from auglocal_ext import cli, models
from auglocal_ext.cli import main

FILES = {"model.pt", "settings.json", "history.json", "learning_curve.png"}


def test_train_writes_what_it_says(tmp_path, capsys):
    arguments = ["train", "--data", "fake:100", "--epochs", "2", "--batch-size", "32", "--depth", "2", "--modules", "3"]
    assert main([*arguments, "--runs", str(tmp_path), "--name", "first"]) == 0
    folder = tmp_path / "first"
    assert {file.name for file in folder.iterdir()} == FILES
    history = json.loads((folder / "history.json").read_text())
    assert len(history) == 2 and len(history[0]["module_losses"]) == 3
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["options"]["modules"] == 3 and settings["num_classes"] == 10 and len(settings["classes"]) == 10
    assert len(settings["mean"]) == len(settings["std"]) == 3 and settings["versions"]["torch"] == torch.__version__
    models.resnet20().load_state_dict(torch.load(folder / "model.pt"))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "epoch 2/2  loss " in out
    assert "resnet20 on fake, rule auglocal, depth 2, 3 local modules: test accuracy " in out
    assert f"saved to {folder}: model.pt" in out

    assert main([*arguments, "--runs", str(tmp_path), "--name", "first"]) == 2
    assert f"auglocal: error: {folder} exists already: choose another --name" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["auglocal", "bp"])
def test_the_embedded_default_learns(tmp_path, capsys, rule):
    cut = ["--depth", "2", "--modules", "2"] if rule == "auglocal" else ["--rule", "bp", "--lr", "0.05"]
    assert main(["train", "--epochs", "3", *cut, "--runs", str(tmp_path), "--quiet"]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("resnet20-digits-bp-2" if rule == "bp" else "resnet20-digits-d2-K2-2")
    history = json.loads((folder / "history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["train_accuracy"] > 0.5
    assert "epoch" not in capsys.readouterr().out.split("test accuracy")[0]


def test_plan(capsys):
    assert main(["plan", "--model", "resnet32"]) == 0
    assert capsys.readouterr().out == str(auglocal_ext.plan(models.resnet32(), (128, 3, 32, 32))) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "data must be 'digits'"),
        (["train", "--data", "imagefolder:/nowhere"], "no image folder at /nowhere"),
        (["train", "--batch-size", "1"], "--batch-size must be at least 2, given 1"),
        (
            ["train", "--depth", "40", "--data", "fake:20"],
            "depth must be at most 9 for this network of 10 units, given 40",
        ),
        (["train", "--epochs", "0", "--data", "fake:20"], "epochs must be a whole number"),
        (["train", "--workers", "-1"], "--workers must be at least 0, given -1"),
        (["train", "--name", "../x"], "--name must be a plain folder name, given '../x'"),
        (["plan", "--num-classes", "0"], "--num-classes must be at least 1, given 0"),
        (["plan", "--image-size", "0"], "--image-size must be at least 1, given 0"),
        (["train", "--device", "gpu", "--data", "fake:20"], "device 'gpu' cannot be used here"),
        (["train", "--runs", "/dev/null", "--data", "fake:20", "--epochs", "1", "--rule", "bp"], "Not a directory"),
        (["plan", "--model", "resnet20", "--modules", "99"], "modules must be a whole number from 1 to 10"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("auglocal: error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()  # a run that did not begin leaves nothing behind


def test_ctrl_c_keeps_what_was_trained(tmp_path, capsys, monkeypatch):
    real = cli.train

    def interrupted(*args, on_epoch, **options):
        def stop_after_first(entry):
            on_epoch(entry)
            raise KeyboardInterrupt

        return real(*args, on_epoch=stop_after_first, **options)

    monkeypatch.setattr(cli, "train", interrupted)
    arguments = ["train", "--data", "fake:64", "--epochs", "3", "--depth", "2", "--modules", "2", "--quiet"]
    assert main([*arguments, "--runs", str(tmp_path), "--name", "x"]) == 130
    assert {file.name for file in (tmp_path / "x").iterdir()} == FILES
    assert "interrupted after 1 whole epochs" in capsys.readouterr().err


def test_ctrl_c_before_the_first_epoch_ends(tmp_path, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.data, "load", stopped)
    assert main(["train", "--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nauglocal: interrupted\n"


def test_a_learning_rate_of_zero_is_taken_as_given(tmp_path):
    assert (
        main(
            [
                "train",
                "--data",
                "fake:40",
                "--epochs",
                "1",
                "--rule",
                "bp",
                "--lr",
                "0",
                "--runs",
                str(tmp_path),
                "--name",
                "x",
                "--quiet",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "x" / "history.json").read_text())[0]["lr"] == 0


def test_as_a_module():
    command = [sys.executable, "-m", "auglocal_ext", "plan", "--model", "resnet20", "--rule", "bp"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1 local module, input 128x3x32x32" in out


def test_without_compiled_kernels_it_trains_and_says_so_once(tmp_path):
    command = [sys.executable, "-m", "auglocal_ext", "train", "--data", "fake:64", "--epochs", "1", "--depth", "2",
               "--modules", "2", "--quiet", "--runs", str(tmp_path), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "AUGLOCAL_NATIVE": "0"}, check=True
    )
    assert done.stderr.count("runs its fused ops in plain torch on cpu: same results, more time") == 1
    assert "AUGLOCAL_NATIVE=0 is set" in done.stderr and "pip install -v -e ." in done.stderr
    assert "test accuracy" in done.stdout


def test_plan_under_a_budget(tmp_path, capsys):
    pictures = ["--picture", str(tmp_path / "plan.png"), "--front", str(tmp_path / "front.png")]
    assert (
        main(["plan", "--model", "resnet20", "--batch-size", "32", "--depth", "3", "--budget", "30MB", *pictures]) == 0
    )
    output = capsys.readouterr().out
    assert "budget 30 MB: " in output and "eager BP: " in output and f"saved {tmp_path / 'front.png'}" in output
    assert (tmp_path / "plan.png").stat().st_size > 10_000 < (tmp_path / "front.png").stat().st_size
    assert main(["plan", "--budget", "6 parsecs"]) == 2
    assert "--budget must be a size such as '6GB', '500 MB' or '4GiB', given '6 parsecs'" in capsys.readouterr().err
    assert main(["plan", "--front", "x.png"]) == 2
    assert "give --budget too" in capsys.readouterr().err
