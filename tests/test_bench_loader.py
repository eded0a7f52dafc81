"""The loader's benchmark: its smallest run."""

import importlib
import json
from pathlib import Path

import pytest


def test_the_smallest_run(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "python")
    bench = importlib.import_module("bench_loader")
    file = tmp_path / "of" / "loader.json"
    bench.main(["--device", "cpu", "--batch-size", "4", "--seconds", "0.01", "--json", str(file)])
    written = json.loads(file.read_text())
    loader, step = written["loader_images_per_second"], written["step_images_per_second"]
    assert loader > step > 0 and written["share"] == pytest.approx(step / (loader + step))
    assert written["batch_size"] == 4 and written["commit"]
    assert f"loader {loader:,.0f} images/s, step {step:,.0f} images/s" in capsys.readouterr().out
