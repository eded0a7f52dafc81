"""The loader's benchmark: its smallest run."""

import importlib
import json
from pathlib import Path

import pytest
import torch


def test_the_smallest_run(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    bench = importlib.import_module("bench_loader")
    file = tmp_path / "of" / "loader.json"
    bench.main(["--device", "cpu", "--batch-size", "4", "--seconds", "0.01", "--json", str(file)])
    written = json.loads(file.read_text())
    loader, step = written["loader_images_per_second"], written["step_images_per_second"]
    assert loader > step > 0 and written["share"] == pytest.approx(step / (loader + step))
    assert written["batch_size"] == 4 and written["commit"]
    assert f"loader {loader:,.0f} images/s, step {step:,.0f} images/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bench_loader", "bench_memory", "bench_kernels"])
def test_mistakes_get_one_sentence_before_anything_is_measured(monkeypatch, tmp_path, capsys, name):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    bench = importlib.import_module(name)
    monkeypatch.setattr(bench, "machine", None)
    batch = "--batch" if name == "bench_kernels" else "--batch-size"
    mistakes = [
        ([batch, "0"], f"{batch} must be at least"),
        ([batch, "x"], f"{batch} must be a whole number, given 'x'"),
        (["--seconds", "nan"], "--seconds must be a finite number"),
        (["--seconds", "-1"], "--seconds must be at least 0, given -1.0"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(SystemExit) as stopped:
            bench.main(["--device", "cpu", *arguments])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.startswith(f"{name}: error: {message}") and err.count("\n") == 1
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        assert bench.main(["--device", "cpu", "--json", str(path)]) == 2
        assert f"{name}: error: {path} cannot be written: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bench_loader", "bench_memory", "bench_kernels"])
def test_a_gpu_that_is_not_there(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    bench = importlib.import_module(name)
    try:
        status = bench.main(["--device", "cuda"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and "cannot be used here" in capsys.readouterr().err
