"""The ImageNet recipe on a small folder of real JPEG files, and on generated images."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import auglocal_ext
from auglocal_ext import rules
from auglocal_ext.cli import job

QUICK = ["--epochs", "1", "--batch-size", "8", "--depth", "2", "--device", "cpu", "--quiet"]


@pytest.fixture
def recipe(torchvision, monkeypatch, nothing_compared):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("train_imagenet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photograph-like JPEGs of three classes, each of a colour and of a size of its own; 8 for training, 3 for test."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                width, height = generator.integers(230, 300, 2)
                coarse = generator.integers(0, 120, (6, 6, 3), dtype=np.uint8)
                coarse[..., label] += 100
                image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
                image.save(root / split / name / f"{index}.jpeg", quality=90)
    return root


@pytest.fixture
def trained(recipe, monkeypatch):
    """The models that the program trains, and what it tells `train`."""
    calls, real = [], job.train

    def train(model, *arguments, **options):
        calls.append((model, options))
        return real(model, *arguments, **options)

    monkeypatch.setattr(job, "train", train)
    return calls


def test_a_folder_of_jpegs(recipe, root, trained, tmp_path, capsys):
    results = tmp_path / "of" / "results.jsonl"
    run = ["--data", str(root), "--model", "resnet18", "--modules", "2", "--workers", "2", "--results", str(results)]
    assert recipe.main([*run, *QUICK, "--seed", "3"]) == 0
    (made,) = recipe.records.read(results)
    assert made["settings"] == {
        "dataset": "imagenet",
        "data": str(root),
        "model": "resnet18",
        "rule": "auglocal",
        "depth": 2,
        "modules": 2,
        "budget": None,
        "recompute": False,
        "epochs": 1,
        "batch_size": 8,
        "lr": 0.4 * 8 / 1024,
        "precision": "fp32",
        "seed": 3,
        "train_images": 24,
        "test_images": 9,
        "image_size": 224,
    }
    assert made["local_modules"] == 2 and made["macs_per_bp"] > 1 and len(made["history"]) == 1
    ((model, options),) = trained
    assert model.fc.out_features == 3
    (group,) = options["optimizer"](model.parameters()).param_groups
    assert group["lr"] == 0.4 * 8 / 1024 and group["nesterov"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    assert made["accuracy"]["last"] == made["accuracy"]["best"] == pytest.approx(accuracy(model, root / "val"))
    out = capsys.readouterr().out
    assert f"2 local modules: top-1 {made['accuracy']['last']:.2%} after 1 epoch in " in out
    assert f"record in {results}" in out and "epoch 1/1" not in out


def accuracy(model, folder):
    """Top-1 by Pillow and arithmetic alone: the middle 224 pixels of the image with its shorter side at 256."""
    from PIL import Image

    correct = []
    model.eval()
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in (folder / name).iterdir():
            image = Image.open(path)
            scale = 256 / min(image.size)
            image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
            left, top = (round((side - 224) / 2) for side in image.size)
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
            pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            with torch.no_grad():
                logits = model(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])
            correct.append(logits.argmax().item() == label)
    return sum(correct) / len(correct)


def test_images_of_another_size_with_a_part_held_out(recipe, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    asked = ["--data", "fake:20", "--model", "resnet18", "--rule", "bp", "--epochs", "1", "--batch-size", "8"]
    asked += ["--image-size", "64", "--val-split", "0.2", "--workers", "0", "--results", str(results), "--quiet"]
    assert recipe.main([*asked, "--device", "cpu"]) == 0
    (made,) = recipe.records.read(results)
    assert made["settings"]["image_size"] == 64 and made["settings"]["val_split"] == 0.2
    assert made["settings"]["train_images"] == 16 and 0 <= made["test_accuracy"] <= 1


def test_generated_images_and_a_rule_without_depth(recipe, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    run = ["--data", "fake:11", "--model", "resnet18", "--rule", "bp", "--lr", "0.01", "--results", str(results)]
    assert recipe.main([*run, *QUICK, "--batch-size", "5", "--workers", "0"]) == 0
    (made,) = recipe.records.read(results)
    settings = made["settings"]
    assert (settings["depth"], settings["lr"], settings["data"]) == (None, 0.01, "fake:11")
    assert (settings["train_images"], settings["test_images"]) == (11, 2)
    assert made["local_modules"] == 1 and made["macs_per_bp"] == 1 and made["accuracy"]["last"] in (0, 0.5, 1)
    assert "resnet18, rule bp, 1 local modules: top-1" in capsys.readouterr().out


def test_top5_where_the_training_measures_it(recipe, tmp_path, capsys, monkeypatch):
    real = job.train

    def train(*arguments, **options):
        result = real(*arguments, **options)
        result.history[0]["val_top5_accuracy"] = 0.5
        return result

    monkeypatch.setattr(job, "train", train)
    run = ["--data", "fake:10", "--model", "resnet20", "--rule", "bp", "--results", str(tmp_path / "r.jsonl")]
    assert recipe.main([*run, *QUICK, "--workers", "0"]) == 0
    (made,) = recipe.records.read(tmp_path / "r.jsonl")
    assert made["top5"] == {"last": 0.5, "best": 0.5}
    assert ", top-5 50.00% after 1 epoch" in capsys.readouterr().out


def test_infopro_is_told_the_normalisation(recipe, monkeypatch, tmp_path):
    """It is trained elsewhere: here, that it gets what its loss takes the images back with."""
    told = {}

    class Told(Exception):
        pass

    def train(*arguments, rule, **options):
        told["rule"] = rule
        raise Told

    monkeypatch.setattr(rules.by_name, "InfoPro", lambda mean, std: ("infopro", mean, std), raising=False)
    monkeypatch.setattr(job, "train", train)
    run = ["--data", "fake:10", "--model", "resnet18", "--rule", "infopro", "--results", str(tmp_path / "r.jsonl")]
    with pytest.raises(Told):
        recipe.main([*run, *QUICK])
    assert told["rule"] == ("infopro", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "no image folder at /nowhere: expected /nowhere/train and /nowhere/test (or val)"),
        (["--data", "fake:9"], "--data must be a folder or fake:N (N at least 10), given 'fake:9'"),
        (["--data", "fake:10", "--batch-size", "1"], "--batch-size must be at least 2, given 1"),
        (["--data", "fake:10", "--lr", "0"], "--lr must be above 0, given 0.0"),
        (["--data", "fake:10", "--workers", "-1"], "--workers must be at least 0, given -1"),
        (["--data", "fake:10", "--model", "resnet"], "no model is named 'resnet'"),
        (["--data", "fake:10", "--epochs", "0"], "epochs must be a whole number of at least 1, given 0"),
        (
            ["--data", "fake:10", "--results", "/dev/null/of/r"],
            "/dev/null/of/r cannot be written: Not a directory: /dev/null/of; choose another --results",
        ),
    ],
)
def test_mistakes_get_one_sentence(recipe, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main([*QUICK, "--workers", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_imagenet: error: ") and message in err and err.count("\n") == 1
    assert recipe.records.read(tmp_path / "results.jsonl") == []


def test_the_images_must_be_named(recipe, capsys):
    assert recipe.main(QUICK) == 2
    message = "train_imagenet: error: --data must be given: a folder with train/ and val/, or fake:N\n"
    assert capsys.readouterr().err == message


def test_ctrl_c_leaves_no_record(recipe, monkeypatch, tmp_path, capsys):
    def stopped(*arguments, **options):
        raise auglocal_ext.TrainingInterrupted(type("Result", (), {"history": [{}]}))

    monkeypatch.setattr(job, "train", stopped)
    results = tmp_path / "results.jsonl"
    assert recipe.main(["--data", "fake:10", "--model", "resnet18", "--results", str(results), *QUICK]) == 130
    assert recipe.records.read(results) == []
    assert "interrupted after 1 whole epoch: no record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", f"fake:{'9' * 25}"], "--data fake:N must have at most 10,000,000 images, given 'fake:999"),
        (["--data", "fake:10000001"], "--data fake:N must have at most 10,000,000 images"),
        (["--lr", "inf"], "--lr must be a finite number, above 0, given inf"),
        (["--budget", "-5GB"], "--budget must be a size such as '6GB', '500 MB' or '4GiB', given '-5GB'"),
        (["--rule", "dgl", "--budget", "6GB"], "--budget chooses the cut of rules"),
        (["--depth", "99"], "--depth must be at most 17 for this network of 17 units, given 99"),
        (["--model", "fasterrcnn_resnet50_fpn"], "the model 'fasterrcnn_resnet50_fpn' of torchvision is no image"),
        (["--device", "meta"], "--device 'meta' cannot be used here"),
        (["--workers", "9999"], "--workers must be at most 1,024, given 9999"),
        (["--seed", "one"], "--seed must be a whole number, given 'one'"),
    ],
)
def test_mistakes_in_the_words_of_the_options(recipe, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main([*QUICK, "--data", "fake:10", "--workers", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train_imagenet: error: {message}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_divergence_is_status_3_and_no_record(recipe, monkeypatch, tmp_path, capsys):
    def diverged(*arguments, **options):
        raise auglocal_ext.TrainingDiverged("epoch 1/1: training diverged; lower the learning rate", None)

    monkeypatch.setattr(job, "train", diverged)
    results = tmp_path / "results.jsonl"
    assert recipe.main(["--data", "fake:10", "--model", "resnet18", "--results", str(results), *QUICK]) == 3
    assert "diverged; lower the learning rate: no record" in capsys.readouterr().err and not results.exists()
