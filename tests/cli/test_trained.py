"""The commands for what was trained, and for what can be: evaluate, export, models, plan."""

import json
import re
import sys

import pytest
import torch

from auglocal_ext import data, evaluation, models, report
from auglocal_ext.cli.program import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a ResNet-20 on generated images."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ["--data", "fake:60", "--epochs", "2", "--rule", "bp", "--quiet", "-b", "20", "--name", "x"]
    assert main(["train", *arguments, "--runs", str(runs)]) == 0
    return runs / "x"


@pytest.fixture
def drawn(monkeypatch):
    """What the picture was told, where none is drawn."""
    told = []
    monkeypatch.setattr(report, "confusion_picture", lambda *given: told.append(given))
    return told


def refused(arguments, message, capsys):
    __tracebackhide__ = True
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert re.match(f"auglocal: error: {message}", captured.err), captured.err


def test_evaluate_a_run(run, drawn, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--quiet", "--batch-size", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    history = json.loads((run / "history.json").read_text())
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["top1"] == history[-1]["val_accuracy"] and kept["images"] == 20
    assert kept["loss"] == pytest.approx(history[-1]["val_loss"]) and kept["classes"] == [str(i) for i in range(10)]
    assert sum(map(sum, kept["confusion"])) == 20 and len(kept["per_class"]) == 10
    assert lines[0] == (
        f"resnet20 on the test images of fake:60, 20 images: loss {kept['loss']:.4f}, top-1 {kept['top1']:.2%}, top-5 "
        f"{kept['top5']:.2%}"
    )
    assert lines[1].split() == ["class", "accuracy", "images"] and len(lines) == 13
    assert lines[2].split() == ["0", f"{kept['per_class'][0]:.2%}", "2"]
    ((confusion, classes, path, title),) = drawn
    assert confusion.tolist() == kept["confusion"] and path == run / "confusion_matrix.png"
    assert classes == kept["classes"] and title == f"resnet20 on fake, top-1 {kept['top1']:.2%}"


def test_other_data_are_normalised_as_the_model_was_trained(run, tmp_path):
    out = ["--quiet", "--out", str(tmp_path / "of")]
    assert main(["evaluate", str(run), "--data", "digits", *out]) == 0
    assert (tmp_path / "of" / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "of" / "evaluation.json").read_text())
    settings = json.loads((run / "settings.json").read_text())
    model = models.resnet20()
    model.load_state_dict(torch.load(run / "model.pt"))
    test = data.load("digits", 100, normalisation=(settings["mean"], settings["std"])).test
    assert kept["data"] == "digits" and kept["top1"] == evaluation(model, test).top1
    assert kept["loss"] == pytest.approx(evaluation(model, test).loss)


def test_evaluate_a_file_of_weights(run, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["--model", "resnet20", "--data", "fake:60", "--quiet"]
    assert main(["evaluate", str(run / "model.pt"), *typed]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 20
    refused(["evaluate", str(run / "model.pt")], "--model tells what a file of weights is of, .*: add --model", capsys)
    refused(["evaluate", str(run), "--model", "resnet20"], "--model tells .*, given .*: leave it out", capsys)
    refused(
        ["evaluate", "no.pt", *typed],
        "no.pt does not exist: give a run's folder, runs/NAME, or a file of weights",
        capsys,
    )
    typed[1] = "resnet32"
    refused(
        ["evaluate", str(run / "model.pt"), *typed], "RUN .* does not fit resnet32 with 10 classes: layer1.3", capsys
    )


def test_what_cannot_be_evaluated(run, tmp_path, capsys):
    refused(["evaluate", str(tmp_path)], ".* is no run of auglocal train, expected a folder with settings.json", capsys)
    settings = json.loads((run / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    refused(["evaluate", str(tmp_path), "--quiet"], ".* has no model.pt, which a run writes after its first", capsys)
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"num_classes": 7}))
    message = "the model of .* has 7 classes, given 10 in digits: give data of the same classes"
    refused(["evaluate", str(tmp_path), "--data", "digits", "--quiet"], message, capsys)
    refused(
        ["evaluate", str(run), "--out", "/dev/null"], "/dev/null/evaluation.json cannot be written: .*--out", capsys
    )


def test_models_that_can_be_cut(torchvision, capsys):
    assert main(["models", "resnet[123][82]*"]) == 0
    parameters = sum(parameter.numel() for parameter in models.resnet32().parameters())
    assert capsys.readouterr().out.splitlines() == [
        "model               units   parameters",
        f"resnet32               16  {parameters:>11,}",
        "resnet18                9   11,689,512",
    ]
    refused(["models", "squeezer*"], "no model that can be cut has a name like 'squeezer\\*'", capsys)


def test_export_needs_its_packages(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = "auglocal export needs the packages onnx and onnxscript, onnx does not import here .*: install them with"
    refused(["export", str(run)], message, capsys)
    assert not (run / "model.onnx").exists()


def test_an_exported_model_computes_the_same_for_any_batch(run, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the packages onnx and onnxscript")
    reference = pytest.importorskip("onnx.reference", reason="needs the package onnx")
    assert main(["export", str(run), "--out", str(tmp_path / "m.onnx")]) == 0
    assert "images (batch, 3, 32, 32), normalised by mean [" in capsys.readouterr().out
    model = models.resnet20()
    model.load_state_dict(torch.load(run / "model.pt"))
    exported = reference.ReferenceEvaluator(str(tmp_path / "m.onnx"))
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (logits,) = exported.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images), rtol=1e-3, atol=1e-4)


def test_a_brief_plan(capsys):
    assert main(["plan", "--model", "resnet20", "--modules", "2", "--brief"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 local modules" in lines[0] and max(map(len, lines)) <= 100


class Writer:
    """Of TensorBoard's; keeps what it is told."""

    told: list = []

    def __init__(self, folder):
        self.folder = folder

    def flush(self):
        self.told.append("flushed")

    def add_scalar(self, tag, value, step):
        self.told.append((self.folder, tag, value, step))


def test_events_for_tensorboard(tmp_path, monkeypatch, capsys):
    arguments = ["train", "--data", "fake:20", "--epochs", "1", "--rule", "bp", "--quiet", "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard needs the package tensorboard, which does not import here .*: install it with pip install"
    refused([*arguments, "--runs", str(tmp_path / "no")], message, capsys)
    assert not (tmp_path / "no").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))
    assert main([*arguments, "--runs", str(tmp_path), "--name", "x"]) == 0
    (entry,) = json.loads((tmp_path / "x" / "history.json").read_text())
    folder = str(tmp_path / "x" / "tensorboard")
    for tag, name in (("loss/train", "loss"), ("loss/validation", "val_loss"), ("learning rate", "lr")):
        assert (folder, tag, entry[name], 1) in Writer.told
    assert (folder, "module loss/0", entry["module_losses"][0], 1) in Writer.told
    assert (folder, "module accuracy/0", entry["module_accuracies"][0], 1) in Writer.told
    assert Writer.told[-1] == "flushed" and Writer.told.count("flushed") == 1
