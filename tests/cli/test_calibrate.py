"""`auglocal calibrate`"""

import json
from functools import partial

import torch

from auglocal_ext.cli import calibrate
from auglocal_ext.cli.program import main
from auglocal_ext.planning.calibration import load
from auglocal_ext.planning.calibration_cases import convolution
from auglocal_ext.planning.calibration_measure import measure


def test_it_leaves_what_load_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.device("meta"):
        tiny = partial(measure, cases=[convolution(16, 16, 4, 3)], parameters=[(2, 10)])
    monkeypatch.setattr(calibrate, "measure", tiny)
    assert main(["calibrate", "--device", "cpu"]) == 0
    (file,) = (tmp_path / "auglocal_ext").iterdir()
    out, written = capsys.readouterr().out, json.loads(file.read_text())
    assert out.endswith(f"saved {file}\n") and f"{len(written['samples']):,} times of {written['device']}" in out
    assert written["threads"] == torch.get_num_threads() and written["precision"] == "fp32"
    assert len(load("cpu", "fp32").samples) == len(written["samples"])


def test_a_cache_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "measure", None)
    assert main(["calibrate", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "cannot be written: Not a directory" in err and err.endswith("choose another XDG_CACHE_HOME\n")


def test_mistakes_get_one_sentence(capsys):
    for arguments, message in (
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--device", "tpu"], "--device 'tpu' cannot be used here"),
    ):
        assert main(["calibrate", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
