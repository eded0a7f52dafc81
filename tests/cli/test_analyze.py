"""`auglocal analyze`: its files say what the library finds, and the page needs nothing else."""

import json
import re
import shutil

import pytest
import torch

from auglocal_ext import analysis, data, evaluation, models
from auglocal_ext.cli.program import main

NET = "small"  # a ResNet of 4 units, which is quick


@pytest.fixture(scope="module")
def small():
    """`--model small` is a ResNet of 4 units."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._CIFAR, NET, lambda classes: models.CifarResNet(1, classes))
        yield


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A run of local modules, and one of backpropagation on fewer images, which are normalised otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    typed = ["train", "--model", NET, "--epochs", "1", "--image-size", "8", "--quiet", "--runs", str(folder)]
    assert main([*typed, "--name", "local", "--rule", "predsim"]) == 0
    assert main([*typed, "--name", "whole", "--rule", "bp", "--val-split", "0.3"]) == 0
    return folder


@pytest.fixture(scope="module")
def analysed(runs):
    """(folder of its files, its analysis.json)"""
    out = runs / "out"
    typed = ["analyze", str(runs / "local"), "--reference", str(runs / "whole"), "--out", str(out), "--quiet"]
    assert main([*typed, "--images", "200", "-b", "50"]) == 0
    return out, json.loads((out / "analysis.json").read_text())


def trained(folder):
    model = models.CifarResNet(1)
    model.load_state_dict(torch.load(folder / "model.pt"))
    return model


def test_what_it_finds_is_what_the_library_finds(runs, analysed):
    _, found = analysed
    local, whole = found["runs"]
    assert (local["name"], whole["name"], found["reference"]) == ("local", "whole", 1)
    assert local["units"] == ["stem", "layer1.0", "layer2.0", "layer3.0"]
    images = [found[name] for name in ("test_images", "cka_images", "train_images")]
    assert found["data"] == "digits" and images == [200, 200, 200]
    sources = []
    for run in (local, whole):
        its = json.loads((runs / run["name"] / "settings.json").read_text())
        source = data.load("digits", 50, image_size=8, normalisation=(its["mean"], its["std"]))
        test, train = source.test.sample(200), source.train.sample(200)
        model = trained(runs / run["name"])
        assert run["test_accuracy"] == pytest.approx(evaluation(model, test).top1, abs=0.006)
        probes = [accuracy for _, accuracy in analysis.probe(model, train, test)]
        assert run["probes"] == pytest.approx(probes, abs=0.02)
        sources.append((model, test))
    (model, test), (other, others) = sources
    assert not torch.equal(test.mean, others.mean)
    pairs = {(pair["rows"], pair["columns"]): torch.tensor(pair["matrix"]).double() for pair in found["cka"]}
    assert set(pairs) == {(0, 1), (0, 0), (1, 1)}
    torch.testing.assert_close(pairs[0, 0], analysis.cka(model, model, test).matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs[1, 1], analysis.cka(other, other, others).matrix, rtol=0, atol=1e-5)


def test_local_accuracy_is_the_last_epochs(runs, analysed):
    _, found = analysed
    for run in found["runs"]:
        (entry,) = json.loads((runs / run["name"] / "history.json").read_text())
        assert run["module_accuracies"] == entry["module_accuracies"] and run["epochs"] == 1
    assert [len(run["module_accuracies"]) for run in found["runs"]] == [4, 1]


def test_the_page_needs_nothing_else(analysed):
    out, found = analysed
    page = (out / "report.html").read_text()
    pictures = ["probes.png", "local_accuracy.png", "cka_1_2.png", "cka_1.png", "cka_2.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(["analysis.json", "report.html", *pictures])
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", text.replace(found["runs"][0]["folder"], ""))
    assert f"<td>{100 * found['runs'][0]['probes'][0]:.2f}</td>" in text and torch.__version__ in text


def test_one_run_without_probes_goes_beside_it(runs, small, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "<whole>")
    (tmp_path / "<whole>" / "history.json").unlink()
    assert main(["analyze", str(tmp_path / "<whole>"), "--no-probes", "--quiet"]) == 0
    out = tmp_path / "<whole>" / "analysis"
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "cka_1.png", "report.html"]
    (run,) = json.loads((out / "analysis.json").read_text())["runs"]
    assert run["probes"] is run["module_accuracies"] is run["epochs"] is None
    page = (out / "report.html").read_text()
    assert "&lt;whole&gt;" in page and "None" not in page
    assert f"saved to {out}: analysis.json, report.html, cka_1.png" in capsys.readouterr().out


def test_runs_of_one_name_and_the_same_run_twice(runs, small, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    typed = [str(runs / "whole"), str(tmp_path / "whole"), str(runs / "local" / ".." / "whole")]
    assert main(["analyze", *typed, "--no-probes", "--quiet", "--images", "40", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [run["name"] for run in found["runs"]] == typed[:2]
    assert [(pair["rows"], pair["columns"]) for pair in found["cka"]] == [(1, 0), (0, 0), (1, 1)]
    torch.testing.assert_close(torch.tensor(found["cka"][0]["matrix"]).diagonal(), torch.ones(4))


def test_mistakes(runs, small, tmp_path, capsys):
    def refused(message, *arguments):
        __tracebackhide__ = True
        capsys.readouterr()
        assert main(["analyze", *map(str, arguments), "--quiet"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.match(f"auglocal: error: {message}", err), err

    refused(".*nowhere is no run of auglocal train, expected a folder with settings.json", runs / "nowhere")
    refused(".*nowhere is no run of auglocal train", runs / "local", "--reference", runs / "nowhere")
    refused("--images must be at least 4, given 3", runs / "local", "--images", 3)
    refused("--batch-size must be at least 4, given 2", runs / "local", "-b", 2)
    refused("/dev/null/analysis.json cannot be written: .*choose another --out", runs / "local", "--out", "/dev/null")
    refused("--data must be 'digits'", runs / "local", "--data", "nothing", "--out", tmp_path)
    assert not any(tmp_path.iterdir()) and not (runs / "local" / "analysis").exists()
