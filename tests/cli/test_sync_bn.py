"""Runs and plans whose BatchNorms go by the images of all processes."""

import re

import pytest
import torch

from auglocal_ext import models
from auglocal_ext.cli.errors import in_words_of_options
from auglocal_ext.cli.program import main


def test_a_run_is_made_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models._CIFAR, "small", lambda classes: models.CifarResNet(1, classes))
    typed = "train --model small --data fake:20 --image-size 8 --epochs 1 -b 16 --rule bp --name x --sync-bn"
    assert main([*typed.split(), "--runs", str(tmp_path)]) == 0
    assert "sync bn on" in capsys.readouterr().out
    state = torch.load(tmp_path / "x" / "checkpoint" / "last.pt")["trainer"]
    assert state["made_of"]["sync_batch_norm"] is True


def test_a_plan_counts_what_it_needs(capsys):
    peaks = []
    for more in ([], ["--sync-bn"]):
        assert main(["plan", "--model", "resnet20", "-b", "4", "--modules", "2", "--depth", "2", *more]) == 0
        peaks.append(float(re.search(r"a step's peak, ([\d.]+) MB", capsys.readouterr().out)[1]))
    assert peaks[0] <= peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("said", ["sync_batch_norm=True cannot synchronise", "or leave sync_batch_norm out"])
def test_errors_call_it_by_its_option(said):
    assert in_words_of_options(ValueError(said)) == re.sub("sync_batch_norm(=True)?", "--sync-bn", said)
