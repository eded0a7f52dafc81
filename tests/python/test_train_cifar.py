"""The recipe of the small data sets: its schedule, its record, and what it says."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import auglocal_ext
from auglocal_ext import data, rules
from auglocal_ext.cli import job

SMALL = ["--data", "fake:40", "--epochs", "1", "--model", "resnet20", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture
def recipe(monkeypatch, tmp_path, nothing_compared):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("train_cifar")


def test_a_training_adds_its_record(recipe, capsys):
    saved = ["--save", "of/model.pt"]
    assert recipe.main([*SMALL, "--results", "of/results.jsonl", "--seed", "3", "--modules", "2", *saved]) == 0
    assert recipe.main([*SMALL, "--results", "of/results.jsonl", "--rule", "bp", "--depth", "7", "--lr", "0.05"]) == 0
    local, bp = recipe.records.read("of/results.jsonl")
    assert local["settings"] == {
        "dataset": "cifar10",
        "data": "fake:40",
        "model": "resnet20",
        "rule": "auglocal",
        "depth": 4,
        "modules": 2,
        "form": None,
        "epochs": 1,
        "batch_size": 16,
        "lr": 0.0125,
        "precision": "fp32",
        "seed": 3,
        "train_images": 40,
        "test_images": 20,
    }
    assert local["local_modules"] == 2 and 0 <= local["accuracy"]["last"] <= 1 and local["peak_bytes"] > 0
    expected = {"rule": "bp", "depth": None, "modules": None, "lr": 0.05, "seed": 0}
    assert bp["settings"] == local["settings"] | expected and bp["local_modules"] == 1
    out = capsys.readouterr().out
    assert "resnet20 on cifar10, rule auglocal, 2 local modules: test accuracy " in out
    assert "peak memory " in out and "record in of/results.jsonl" in out
    model, images = auglocal_ext.models.resnet20(10), data.load("fake:40", 16).test
    model.load_state_dict(torch.load("of/model.pt"))
    assert auglocal_ext.evaluate(model, images) == local["accuracy"]["last"]


def test_what_the_recipe_has_otherwise_is_in_the_record(recipe):
    other = ["--opt", "adamw", "--label-smoothing", "0.0", "--warmup", "0.5", "--schedule", "step", "--rule", "bp"]
    assert recipe.main([*SMALL, "--quiet", *other]) == 0
    (made,) = recipe.records.read("results.jsonl")
    assert made["settings"].items() >= {"optimizer": "adamw", "lr": 1e-3, "schedule": "step", "warmup": 0.5}.items()
    assert "label_smoothing" not in made["settings"] and "momentum" not in made["settings"]


@pytest.fixture
def asked(monkeypatch):
    """What the data and the training were asked for; nothing is read or trained."""
    asked = SimpleNamespace()

    def load(source, batch_size, **options):
        asked.source, asked.batch_size, asked.reading = source, batch_size, options
        return real("fake:40", 16)

    def train(model, loader, depth, **options):
        asked.depth, asked.training = depth, options
        raise KeyboardInterrupt

    real = data.load
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(job, "train", train)
    return asked


@pytest.mark.parametrize(
    ("dataset", "batch_size", "lr", "augmentation"),
    [
        ("cifar10", 1024, 0.8, {"pad": 4, "flip": True}),
        ("svhn", 1024, 0.8, {"pad": 2, "flip": False}),
        ("stl10", 128, 0.1, {"pad": 4, "flip": True}),
    ],
)
def test_the_papers_settings(recipe, asked, dataset, batch_size, lr, augmentation, capsys):
    assert recipe.main(["--dataset", dataset, "--quiet"]) == 130
    assert (asked.source, asked.batch_size) == (f"{dataset}:data", batch_size)
    assert asked.reading["augmentation"] == augmentation and asked.reading["device"] == asked.training["device"]
    assert asked.training["epochs"] == 400 and asked.training["schedule"](0, 400) * lr == pytest.approx(0.01)
    group = asked.training["optimizer"]([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert group["lr"] == pytest.approx(lr)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    assert "train_cifar: interrupted: no record" in capsys.readouterr().err
    assert not Path("results.jsonl").exists()


def test_infopro_is_told_the_normalisation(recipe, asked, monkeypatch):
    monkeypatch.setattr(rules.by_name, "InfoPro", lambda mean, std: ("infopro", mean, std), raising=False)
    assert recipe.main(["--rule", "infopro"]) == 130
    described = data.load("fake:40", 16).description
    assert asked.training["rule"] == ("infopro", described["mean"], described["std"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "--batch-size must be at least 2, given 1"),
        (["--lr", "0"], "--lr must be above 0, given 0.0"),
        (
            ["--results", "/dev/null/x"],
            "/dev/null/x cannot be written: File exists: /dev/null; choose another --results",
        ),
        (["--save", "/dev/null/x"], "/dev/null/x cannot be written: File exists: /dev/null; choose another --save"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--data", "mnist"], "data must be 'digits'"),
        (["--data", "imagefolder:nowhere"], "no image folder at nowhere"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, given 0"),
        (["--depth", "40"], "depth must be at most 9"),
        (["--model", "nothing"], "no model is named 'nothing'"),
    ],
)
def test_mistakes_get_one_sentence(recipe, arguments, message, torchvision, capsys):
    assert recipe.main([*SMALL, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_cifar: error: ") and message in err and "Traceback" not in err
    assert not any(json.loads(line) for file in Path().glob("*.jsonl") for line in file.read_text().splitlines())


def test_large_images_are_not_for_it(recipe, torchvision, capsys):
    from PIL import Image

    for part in ("train", "test"):
        Path(part, "cat").mkdir(parents=True)
        Image.new("RGB", (100, 120)).save(Path(part, "cat", "0.png"))
    assert recipe.main([*SMALL, "--data", "imagefolder:."]) == 2
    assert "images must be of up to 96 pixels, given larger ones in imagefolder:." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "--lr must be a finite number, above 0, given nan"),
        (["--lr", "-0.1"], "--lr must be above 0, given -0.1"),
        (["--device", "mps"], "--device 'mps' cannot be used here: it must be 'cpu', 'cuda' or 'cuda:N'"),
        (["--seed", "9" * 25], "--seed must be at most"),
        (["--depth", "foo"], "--depth must be a whole number, given 'foo'"),
        (["--depth", "40"], "--depth must be at most 9"),
        (["--modules", "99"], "--modules must be a whole number from 1 to 10"),
        (["--rule", "bp", "--modules", "2"], "--rule bp has one module: leave --modules out"),
        (["--model", "raft_large"], "the model 'raft_large' of torchvision is no image classifier"),
        (["--data", "fake:" + "9" * 25], "--data must be 'digits'"),
        (["--epochs", "many"], "--epochs must be a whole number, given 'many'"),
        (["--rule", "magic"], "argument --rule: invalid choice: 'magic'"),
        (["--save", "."], ". cannot be written: Is a directory: "),
    ],
)
def test_mistakes_are_told_before_data_is_read(recipe, arguments, message, torchvision, capsys, monkeypatch):
    monkeypatch.setattr(data.sources, "_fake", None)
    assert recipe.main([*SMALL, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train_cifar: error: {message}") and err.count("\n") == 1


def diverging(spoilt):
    """`train` whose model is spoilt after that many epochs."""
    real = job.train

    def train(model, *arguments, on_epoch, **options):
        def spoil(entry):
            on_epoch(entry)
            if entry["epoch"] == spoilt:
                model.fc.bias.data.fill_(math.inf)

        return real(model, *arguments, on_epoch=spoil, **options)

    return train


def test_it_goes_on_from_a_checkpoint(recipe, capsys):
    asked = [*SMALL, "--epochs", "2", "--rule", "bp", "--checkpoint", "run"]
    assert recipe.main([*SMALL, "--epochs", "2", "--rule", "bp", "--quiet", "--results", "whole.jsonl"]) == 0
    assert recipe.main([*asked, "--max-seconds", "0.01", "--quiet"]) == 0
    assert "stopped after --max-seconds, no record: the same command goes on, from run" in capsys.readouterr().out
    assert Path("run/last.pt").exists() and not Path("results.jsonl").exists()
    assert recipe.main([*asked, "--max-seconds", "600", "--quiet"]) == 0
    (whole,), (part,) = (recipe.records.read(name) for name in ("whole.jsonl", "results.jsonl"))
    assert part["settings"] == whole["settings"] and part["accuracy"] == whole["accuracy"]
    assert [entry["loss"] for entry in part["history"]] == [entry["loss"] for entry in whole["history"]]


def test_a_divergence_is_status_3_and_no_record(recipe, capsys, monkeypatch):
    monkeypatch.setattr(job, "train", diverging(1))
    assert recipe.main([*SMALL, "--epochs", "2", "--rule", "bp", "--quiet", "--save", "m.pt"]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("train_cifar: epoch 2/2, step 1: the loss of local module 0 of 1 (stem")
    assert "training diverged; lower the learning rate with --lr: no record\n" in captured.err
    assert not captured.out and not Path("results.jsonl").exists()
    assert all(value.isfinite().all() for value in torch.load("m.pt").values())  # the epoch before


def test_a_record_that_cannot_be_added_is_printed(recipe, capsys, monkeypatch):
    def full(*arguments):
        raise OSError("results.jsonl cannot be written: No space left on device")

    monkeypatch.setattr(recipe.records, "append_line", full)
    assert recipe.main([*SMALL, "--rule", "bp", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["settings"]["rule"] == "bp"
    assert captured.err == "train_cifar: error: results.jsonl cannot be written: No space left on device\n"


def test_records_that_a_kill_has_cut_off(recipe):
    records, path = recipe.records, Path("r.jsonl")
    made = [dict.fromkeys(sorted(records.FIELDS), value) for value in ("first", "second", "third")]
    records.append(path, made[0])
    whole = path.read_text()
    for torn in ('{"settings": {"da', "{", '{"settings": 1}, "x'):
        path.write_text(whole + torn)
        assert records.read(path) == made[:1]  # torn, and no error
        records.append(path, made[1])
        records.append(path, made[2])
        assert records.read(path) == made
    path.write_text(whole.rstrip())  # an editor's: whole, but without its end
    records.append(path, made[1])
    assert records.read(path) == made[:2]
    path.write_text("{" + whole)
    with pytest.raises(ValueError, match="r.jsonl, line 1, is not a record, but '{{"):
        records.read(path)


@pytest.mark.parametrize("text", ["[]", "{}", "1", '{"settings": {}}', "\xff\xfe"])
def test_lines_that_are_no_records(recipe, text):
    Path("r.jsonl").write_bytes(text.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match="r.jsonl, line 1, is not a record"):
        recipe.records.read("r.jsonl")
