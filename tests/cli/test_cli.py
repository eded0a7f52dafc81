"""The command line, run as a user runs it."""

import argparse
import csv
import errno
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import auglocal_ext
from auglocal_ext import data, models
from auglocal_ext.cli import job
from auglocal_ext.cli import plan as cli_plan
from auglocal_ext.cli.errors import run
from auglocal_ext.cli.options import Parser, number, whole
from auglocal_ext.cli.program import main
from auglocal_ext.training.epoch import Sums

FILES = {"model.pt", "settings.json", "history.json", "history.csv", "learning_curve.png", "checkpoint"}


def test_train_writes_what_it_says(tmp_path, capsys):
    arguments = ["train", "--data", "fake:100", "--epochs", "2", "--batch-size", "32", "--depth", "2", "--modules", "3"]
    assert main([*arguments, "--runs", str(tmp_path), "--name", "first"]) == 0
    folder = tmp_path / "first"
    assert {file.name for file in folder.iterdir()} == FILES
    history = json.loads((folder / "history.json").read_text())
    assert len(history) == 2 and len(history[0]["module_losses"]) == 3
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(rows[1][f"module_losses.{index}"]) for index in range(3)] == history[1]["module_losses"]
    assert float(rows[1]["val_accuracy"]) == history[1]["val_accuracy"]
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


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(("rule", "epochs"), [("auglocal", "2"), ("bp", "3")])
def test_the_embedded_default_learns(tmp_path, capsys, rule, epochs):
    cut = ["--depth", "2", "--modules", "2"] if rule == "auglocal" else ["--rule", "bp", "--lr", "0.05"]
    assert main(["train", "--epochs", epochs, *cut, "--runs", str(tmp_path), "--quiet"]) == 0
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


@pytest.mark.usefixtures("nothing_compared")
def test_ctrl_c_keeps_what_was_trained(tmp_path, capsys, monkeypatch):
    real = job.train

    def interrupted(*args, on_epoch, **options):
        def stop_after_first(entry):
            on_epoch(entry)
            raise KeyboardInterrupt

        return real(*args, on_epoch=stop_after_first, **options)

    monkeypatch.setattr(job, "train", interrupted)
    arguments = ["train", "--data", "fake:64", "--epochs", "3", "--depth", "2", "--modules", "2", "--quiet"]
    assert main([*arguments, "--runs", str(tmp_path), "--name", "x"]) == 130
    assert {file.name for file in (tmp_path / "x").iterdir()} == FILES
    assert "interrupted after 1 whole epoch" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_compared")
def test_resume_goes_on_as_if_nothing_had_been(tmp_path, capsys, monkeypatch):
    arguments = [*FAKE, "--data", "fake:64", "--image-size", "8", "--epochs", "3", "--runs", str(tmp_path), "--name"]
    assert main([*arguments, "whole"]) == 0
    real = job.train

    def interrupted(*args, on_epoch, **options):
        def stop_after_second(entry):
            on_epoch(entry)
            if entry["epoch"] == 2:
                raise KeyboardInterrupt

        return real(*args, on_epoch=stop_after_second, **options)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train", interrupted)
        assert main([*arguments, "part"]) == 130
    assert main(["resume", str(tmp_path / "part"), "--quiet"]) == 0
    whole, part = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    losses = [
        [e["loss"] for e in json.loads((tmp_path / name / "history.json").read_text())] for name in ("whole", "part")
    ]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert main(["resume", str(tmp_path / "part"), "--quiet", "--epochs", "4"]) == 0
    assert len(json.loads((tmp_path / "part" / "history.json").read_text())) == 4
    weights = torch.load(tmp_path / "part" / "model.pt")
    (tmp_path / "part" / "model.pt").unlink()
    assert main(["resume", str(tmp_path / "part"), "--quiet"]) == 0  # nothing is left to train
    again = torch.load(tmp_path / "part" / "model.pt")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    before = (tmp_path / "part" / "settings.json").read_text()
    capsys.readouterr()
    one_sentence(
        "auglocal", ["resume", str(tmp_path / "part"), "--epochs", "2"], ".*has a training of 4 epochs", capsys
    )
    assert (tmp_path / "part" / "settings.json").read_text() == before
    one_sentence(
        "auglocal", ["resume", str(tmp_path)], ".* is no run of auglocal train, expected a folder with", capsys
    )


@pytest.mark.usefixtures("nothing_compared")
def test_a_stop_within_the_first_epoch_is_gone_on_from(tmp_path, capsys):
    arguments = ["--data", "fake:64", "--batch-size", "16", "--quiet", "--runs", str(tmp_path), "--name", "x"]
    assert main([*FAKE, *arguments, "--max-seconds", "0.001"]) == 0
    folder = tmp_path / "x"
    assert capsys.readouterr().out == (
        f"stopped in the first epoch by --max-seconds: `auglocal resume {folder}` goes on\n"
    )
    assert {file.name for file in folder.iterdir()} == {"settings.json", "checkpoint"}
    assert main(["resume", str(folder), "--quiet", "--max-seconds", "600"]) == 0
    assert main([*FAKE, *arguments, "--name", "whole"]) == 0
    whole, part = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "x"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


@pytest.mark.usefixtures("nothing_compared")
def test_patience_is_told(tmp_path, capsys):
    arguments = ["--epochs", "5", "--lr", "0", "--patience", "1", "--runs", str(tmp_path)]
    assert main([*FAKE, *arguments, "--schedule", "constant"]) == 0
    assert re.search(r"test accuracy .* after \d epochs, stopped by --patience, in ", capsys.readouterr().out)


def test_ctrl_c_before_the_first_epoch_ends(tmp_path, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", stopped)
    assert main(["train", "--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nauglocal: interrupted\n"


@pytest.mark.usefixtures("nothing_compared")
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


def test_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["auglocal_ext", "plan", "--model", "resnet20", "--rule", "bp"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("auglocal_ext", run_name="__main__")
    assert ended.value.code == 0
    assert "1 local module, input 128x3x32x32" in capsys.readouterr().out


def test_without_compiled_kernels_it_trains_and_says_so_once(tmp_path):
    command = [sys.executable, "-m", "auglocal_ext", "train", "--data", "fake:64", "--epochs", "1", "--depth", "2",
               "--image-size", "8", "--modules", "2", "--quiet", "--runs", str(tmp_path), "--device",
               "cpu"]  # fmt: skip
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
    assert "budget 30 MB: " in output and "eager BP " in output and f"saved {tmp_path / 'front.png'}" in output
    assert (tmp_path / "plan.png").stat().st_size > 10_000 < (tmp_path / "front.png").stat().st_size
    assert main(["plan", "--budget", "6 parsecs"]) == 2
    assert "--budget must be a size such as '6GB', '500 MB' or '4GiB', given '6 parsecs'" in capsys.readouterr().err
    assert main(["plan", "--front", "x.png"]) == 2
    assert "give --budget too" in capsys.readouterr().err


HUGE = "99999999999999999999999"
FAKE = ["train", "--data", "fake:20", "--epochs", "1", "--rule", "bp", "--quiet"]
MISTAKES = [
    (
        ["train", "--data", f"fake:{HUGE}"],
        f"--data must be .* 'fake:N' \\(N from 20 to 100,000\\), given 'fake:{HUGE}'",
    ),
    (["train", "--data", "fake:-5"], "--data must be .* given 'fake:-5'"),
    (["train", "--data", ""], "--data must be 'digits'"),
    (["train", "--device", "meta"], "--device 'meta' cannot be used here: it must be 'cpu', 'cuda' or 'cuda:N'; leave"),
    (["train", "--device", "mps"], "--device 'mps' cannot be used here: it must be 'cpu', 'cuda' or 'cuda:N'; leave"),
    (["train", "--device", "xpu"], "--device 'xpu' cannot be used here"),
    (["train", "--device", f"cuda:{HUGE}"], "--device 'cuda:9+' cannot be used here"),
    (["train", "--device", ""], "--device '' cannot be used here"),
    (["train", "--seed", HUGE], f"--seed must be at most 18,446,744,073,709,551,615, given {HUGE}"),
    (["train", "--seed", f"-{HUGE}"], f"--seed must be at least -9223372036854775808, given -{HUGE}"),
    (["train", "--seed", "1.5"], "--seed must be a whole number, given '1.5'"),
    (["train", "--lr", "nan"], "--lr must be a finite number, at least 0, given nan"),
    (["train", "--lr", "inf"], "--lr must be a finite number, at least 0, given inf"),
    (["train", "--lr", "-inf"], "--lr must be a finite number, at least 0, given -inf"),
    (["train", "--lr", "-1"], "--lr must be at least 0, given -1.0"),
    (["train", "--lr", "fast"], "--lr must be a number, given 'fast'"),
    (["train", "--epochs", "0"], "--epochs must be a whole number of at least 1, given 0"),
    (["train", "--epochs", "1.5"], "--epochs must be a whole number, given '1.5'"),
    (["train", "--epochs", HUGE], f"--epochs must be at most 1,000,000, given {HUGE}"),
    (["train", "--batch-size", "0"], "--batch-size must be at least 2, given 0"),
    (["train", "--batch-size", HUGE], "--batch-size must be at most 1,000,000"),
    (["train", "--workers", HUGE], "--workers must be at most 1,024"),
    (["train", "--depth", "foo"], "--depth must be a whole number or auto, given 'foo'"),
    (["train", "--depth", "1"], "--depth must be at least 2 or auto, given 1"),
    (["train", "--depth", "40"], "--depth must be at most 9 for this network of 10 units, given 40"),
    (["train", "--depth", "auto"], "--depth auto chooses under a budget: give --budget too, for instance --budget 6GB"),
    (["train", "--modules", "0"], "--modules must be at least 1, given 0"),
    (
        ["train", "--modules", "11"],
        "--modules must be a whole number from 1 to 10, the units of this network, given 11",
    ),
    (["train", "--modules", "two"], "--modules must be a whole number, given 'two'"),
    (["train", "--rule", "bp", "--modules", "3"], "--rule bp has one module: leave --modules out, or set it to 1"),
    (["train", "--rule", "dgl", "--form", "cifar"], "--form is a choice of rule 'auglocal': leave it out with 'dgl'"),
    (["train", "--rule", "dgl", "--budget", "6GB"], "--budget chooses the cut of rules .*: with 'dgl' give --modules"),
    (["train", "--rule", "magic"], "argument --rule: invalid choice: 'magic'"),
    (["train", "--recompute=maybe"], "recompute must be True, False, 'auto' under a memory budget, or names of units"),
    (
        ["train", "--units=layer7"],
        "--units: no module or unit of CifarResNet is called 'layer7': expected paths of",
    ),
    (["train", "--budget", "-5GB"], "--budget must be a size such as '6GB', '500 MB' or '4GiB', given '-5GB'"),
    (["train", "--budget", "0"], "--budget must be a size .* given '0'"),
    (["train", "--budget", f"1{'0' * 400}GB"], "--budget must be a size"),
    (["plan", "--budget", "1MB"], "--budget 1 MB is too small for batches of 128: the smallest step of this model"),
    (["train", "--runs", "/dev/null"], "/dev/null/.* cannot be made: Not a directory: .*; choose another --runs"),
    (["train", "--runs", "/dev/null/x"], "/dev/null/x/.* cannot be made: .*; choose another --runs"),
    (["plan", "--image-size", "-32"], "--image-size must be at least 1, given -32"),
    (["plan", "--image-size", HUGE], "--image-size must be at most 10,000"),
    (["plan", "--batch-size", "0"], "--batch-size must be at least 1, given 0"),
    (["plan", "--num-classes", HUGE], "--num-classes must be at most 1,000,000"),
    (["plan", "--front", "x.png"], "--front draws the search under a budget: give --budget too"),
    (["plan", "--picture", "x.doc"], "--picture must end in .png, .pdf, .svg or another .*, given 'x.doc'"),
    (["plan", "--picture", "x"], "--picture must end in .png, .pdf, .svg or another .*, given 'x'"),
    (["plan", "--picture", "no/x.png"], "no/x.png cannot be written: No such file or directory: .*no; choose another"),
    (["plan", "--budget", "6GB", "--front", "x."], "--front must end in .png, .pdf, .svg or another .*, given 'x.'"),
    (["plan", "--budget", "6GB", "--front", "no/x.svg"], "no/x.svg cannot be written: .* choose another --front"),
    (["plan", "--nothing"], "unrecognized arguments: --nothing"),
    (["fly"], "argument train|plan: invalid choice: 'fly'"),
    (["train", "--model", "resnet19"], "no model is named 'resnet19': expected one of resnet20, .* a classifier of"),
]
MODELS = [
    ("raft_large", "the model 'raft_large' of torchvision is no image classifier: expected one of resnet20"),
    ("fasterrcnn_resnet50_fpn", "the model 'fasterrcnn_resnet50_fpn' of torchvision is no image classifier"),
    ("quantized_resnet18", "the model 'quantized_resnet18' of torchvision is no image classifier"),
    ("r3d_18", "the model 'r3d_18' of torchvision is no image classifier"),
    ("deeplabv3_resnet50", "the model 'deeplabv3_resnet50' of torchvision is no image classifier"),
]


def one_sentence(program, arguments, message, capsys, run=main):
    __tracebackhide__ = True
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert re.match(f"{program}: error: {message}", captured.err), captured.err


@pytest.fixture
def nothing_long(monkeypatch, tmp_path):
    """In an empty folder; whatever takes long, or touches data, is a failure."""

    def long(*arguments, **options):
        raise AssertionError("this is long work")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "train", long)
    monkeypatch.setattr(cli_plan, "plan", long)
    for name in ("_digits", "_fake", "image_folders", "_downloaded"):
        monkeypatch.setattr(data.sources, name, long)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_in_the_words_of_the_command_line_before_long_work(arguments, message, request, capsys, tmp_path):
    if arguments[:3] != ["plan", "--budget", "1MB"]:  # which only the search can tell
        request.getfixturevalue("nothing_long")
    one_sentence("auglocal", arguments, message, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(("name", "message"), MODELS)
def test_models_that_cannot_be_trained(command, name, message, torchvision, nothing_long, capsys):
    one_sentence("auglocal", [command, "--model", name], message, capsys)


@pytest.mark.parametrize(("name", "side"), [("vgg11_bn", "16"), ("vgg16", "31"), ("alexnet", "32"), ("vit_b_16", "32")])
def test_images_too_small_for_the_model(name, side, torchvision, nothing_long, capsys):
    message = f"images of {side}x{side} pixels do not go through this model: choose another --image-size"
    one_sentence("auglocal", ["plan", "--model", name, "--image-size", side], message, capsys)


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn"])
def test_data_whose_images_are_too_small_for_the_model(name, torchvision, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "train", None)
    message = "images of 16x16 pixels do not go through this model: choose another --model, or larger images"
    one_sentence("auglocal", ["train", "--model", name, "--runs", str(tmp_path / "runs")], message, capsys)
    assert not list(tmp_path.iterdir())


def test_an_image_of_two_hundred_megapixels(torchvision, capsys, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("1", (20_000, 10_000)).save(tmp_path / split / "a" / "0.png")
    arguments = [*FAKE, "--data", f"imagefolder:{tmp_path}", "--runs", str(tmp_path / "runs")]
    one_sentence("auglocal", arguments, "cannot read the image .*train/a/0.png: replace or remove it", capsys)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    """What no sentence of ours was made for: torch's errors, and those of operations on wrong values."""
    bugs = [lambda: torch.zeros(2) + torch.zeros(3), lambda: int("x"), lambda: [].index(1), lambda: {}["x"]]
    bugs += [lambda: list(zip([1], [], strict=True)), lambda: len(3)]
    for bug in bugs:
        monkeypatch.setattr(job, "check_cut", lambda options, bug=bug: bug())
        with pytest.raises((RuntimeError, ValueError, KeyError, TypeError)):
            main([*FAKE, "--runs", str(tmp_path)])

    with pytest.raises(ValueError, match="not enough values to unpack"):  # in our own code, but no `raise` of it
        run("auglocal", lambda: data.images._size(torch.zeros(2)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("no memory\nmemory_budget='5MB' chooses a cut"),
            "no memory --budget 5MB chooses a cut",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            r"out of memory: give a smaller --batch-size, or a --budget \(DefaultCPUAllocator: can't allocate",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"a process that reads images was ended from outside, .*: give fewer --workers \(DataLoader worker",
        ),
        (
            RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
            "no shared memory is left for processes that read images: give fewer --workers",
        ),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), ".*No space left on device: 'x'"),
        (ImportError("no torchvision"), "no torchvision"),
        (data.images.UnreadableImage("cannot read the image x"), "cannot read the image x"),
    ],
)
def test_what_the_users_machine_and_files_cause(error, message, monkeypatch, capsys, tmp_path):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(job, "train", failing)
    one_sentence("auglocal", [*FAKE, "--runs", str(tmp_path / "runs")], message, capsys)
    assert not list(tmp_path.iterdir())


def test_kinds_of_numbers():
    assert [whole(2, words=("auto",))(text) for text in ("2", "auto", "1_000")] == [2, "auto", 1000]
    assert [number(0)(text) for text in ("0", "1e-3", ".5")] == [0, 0.001, 0.5]
    for kind, text in ((whole(2), "1"), (whole(2), "auto"), (number(above=0), "0"), (number(0), "NaN")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)
    parser = Parser("x")
    parser.add_argument("--lr", type=number(-1))
    assert parser.parse_args(["--lr", "-.5"]).lr == -0.5  # a value, no option


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize("spoilt", [1, 2])
def test_divergence_is_status_3_and_no_success(spoilt, tmp_path, capsys, monkeypatch):
    """Before the first result it leaves nothing; after one, what that one was."""
    real = job.train

    def train(model, loader, *arguments, on_epoch, **options):
        def spoil(parameters):
            optimizer, steps = torch.optim.SGD(parameters, lr=0.01), []

            def after(*given):
                steps.append(given)
                if len(steps) == 2 * spoilt:
                    optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

            optimizer.register_step_post_hook(after)
            return optimizer

        options |= {"optimizer": spoil}
        return real(model, loader, *arguments, on_epoch=on_epoch, **options)

    monkeypatch.setattr(job, "train", train)
    arguments = [*FAKE, "--data", "fake:40", "--batch-size", "20", "--epochs", "2", "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--name", "x"]) == 3
    captured = capsys.readouterr()
    message = (
        f"epoch {spoilt}/2: conv1.weight has values that are NaN or infinite: training diverged; lower the learning"
    )
    assert f"auglocal: {message} rate with --lr, in a new run\n" in captured.err and "functools" not in captured.err
    assert "saved to" not in captured.out + captured.err and not captured.out
    if spoilt == 1:
        assert not (tmp_path / "runs").exists()
        return
    folder = tmp_path / "runs" / "x"
    assert {file.name for file in folder.iterdir()} == FILES and f"1 epoch until then are in {folder}" in captured.err
    assert all(value.isfinite().all() for value in torch.load(folder / "model.pt").values())
    assert len(json.loads((folder / "history.json").read_text())) == 1


@pytest.mark.usefixtures("nothing_compared")
def test_a_training_that_ends_far_worse_is_status_3(tmp_path, capsys, monkeypatch):
    losses, real = iter([2.0, 9.0]), Sums.entry
    monkeypatch.setattr(Sums, "entry", lambda *given: real(*given) | {"loss": next(losses)})
    assert main([*FAKE, "--epochs", "2", "--runs", str(tmp_path), "--name", "x"]) == 3
    captured = capsys.readouterr()
    assert "cross-entropy was 9 in the last epoch, after 2 in the first one" in captured.err and not captured.out
    assert {file.name for file in (tmp_path / "x").iterdir()} == FILES


@pytest.mark.usefixtures("nothing_compared")
def test_a_learning_rate_far_too_high_is_status_3(tmp_path):
    assert main([*FAKE, "--data", "fake:100", "--epochs", "2", "--lr", "1e4", "--runs", str(tmp_path / "runs")]) == 3


@pytest.mark.usefixtures("nothing_compared")
def test_a_full_disk_is_a_sentence_and_leaves_the_epoch_before(tmp_path, capsys, monkeypatch):
    real, saves = torch.save, []

    def save(*arguments):
        saves.extend(["a model"] * ("fc.weight" in arguments[0]))
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(torch, "save", save)
    path = tmp_path / "x" / "model.pt"
    message = (
        f"{path} cannot be written: No space left on device; free some space there, .*; go on with `auglocal resume "
    )
    one_sentence("auglocal", [*FAKE, "--epochs", "2", "--runs", str(tmp_path), "--name", "x"], message, capsys)
    assert torch.load(path) and {file.name for file in path.parent.iterdir()} == FILES - {"learning_curve.png"}


def test_exit_statuses_of_the_real_program(tmp_path):
    """2 of argparse's own kind, and a bug's 1 with its traceback."""
    environment = {**os.environ, "PYTHONPATH": str(Path(auglocal_ext.__file__).parents[1])}
    program = "import sys; from auglocal_ext import cli; {}; sys.exit(cli.main(sys.argv[1:]))"
    for change, status, words in (
        ("pass", 2, "auglocal: error: --depth must be a whole number or auto, given 'foo'\n"),
        ("cli.program.whole = None", 1, "Traceback (most recent call last)"),
    ):
        command = [sys.executable, "-c", program.format(change), "plan", "--depth", "foo"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == status and done.stderr.startswith(words)
