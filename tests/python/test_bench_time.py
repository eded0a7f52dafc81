"""The benchmark of predicted times: its smallest run."""

import importlib
import json
from pathlib import Path

import calibration_helpers
import pytest

from auglocal_ext.planning.calibration import machine, save


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("bench_time")


def test_the_smallest_run(bench, monkeypatch, tmp_path, capsys):
    save(machine("cpu", "fp32"), calibration_helpers.samples())
    monkeypatch.setattr(bench, "NETWORKS", {"resnet20": ((2, 3, 16, 16), 10)})
    monkeypatch.setattr(bench, "CUTS", (("bp", 4, None), ("checkpoint", 4, None), ("auglocal", 2, 3)))
    file = tmp_path / "time.json"
    assert bench.main(["--device", "cpu", "--networks", "resnet20", "--rounds", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    bp, checkpoint, cut = written["rows"]
    assert [row["cut"] for row in written["rows"]] == ["bp", "checkpoint", "auglocal, d = 2, K = 3"]
    assert (bp["measured"], bp["predicted"], bp["error"]) == (1, 1, 0)
    assert checkpoint["predicted"] > 1 and cut["macs"] > 1
    for row in written["rows"]:
        assert row["measured"] == row["measured_ms"] / bp["measured_ms"]
        assert row["error"] == row["predicted"] / row["measured"] - 1
    largest = max(abs(row["error"]) for row in written["rows"])
    assert f"largest error of a time relative to BP's: {largest:.1%}" in capsys.readouterr().out


def test_without_a_calibration_nothing_is_measured(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main(["--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench_time: error: times in fp32 are not known for ") and "auglocal calibrate" in err
