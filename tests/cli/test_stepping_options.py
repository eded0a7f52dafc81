"""Runs whose gradients are accumulated and whose weights are averaged."""

import json
import re

import torch

from auglocal_ext import models
from auglocal_ext.cli.program import main


def test_a_run_leaves_the_averaged_weights(tmp_path, capsys):
    typed = "train --data fake:40 --epochs 1 -b 16 --rule bp --name x --accumulate 2 --clip-grad-norm 1 --model-ema"
    assert main([*typed.split(), "--runs", str(tmp_path)]) == 0
    folder, out = tmp_path / "x", capsys.readouterr().out
    assert "accumulate 2, clip grad norm 1, model ema on" in out and re.search(r"  val .*%.*  averaged [\d.]+%", out)
    assert "model.pt (a plain state_dict), model_ema.pt, of the averaged weights, settings.json" in out
    weights = [torch.load(folder / name) for name in ("model.pt", "model_ema.pt")]
    models.resnet20().load_state_dict(weights[1])
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])
    (entry,) = json.loads((folder / "history.json").read_text())
    assert "ema_val_accuracy" in (folder / "history.csv").read_text() and 0 <= entry["ema_val_accuracy"] <= 1
    assert main(["resume", str(folder), "--epochs", "2", "--quiet"]) == 0
    assert not torch.equal(torch.load(folder / "model_ema.pt")["fc.weight"], weights[1]["fc.weight"])


def test_a_plan_of_them(capsys):
    peaks = []
    for more in ([], ["--accumulate", "2", "--model-ema"]):
        assert main(["plan", "--model", "resnet20", "-b", "4", "--modules", "2", "--depth", "2", *more]) == 0
        peaks.append(float(re.search(r"a step's peak, ([\d.]+) MB", capsys.readouterr().out)[1]))
    assert peaks[1] > peaks[0] + 1
    assert main(["plan", "--clip", "global", "--clip-grad-norm", "1"]) == 2
    assert "--clip global needs --accumulate 2 or more" in capsys.readouterr().err
