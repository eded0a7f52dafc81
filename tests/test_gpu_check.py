"""The program of everything that only a GPU can tell: what it would run, and what it says without one."""

import importlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "python")
    return importlib.import_module("gpu_check")


@pytest.fixture
def commands(monkeypatch):
    """A GPU, and commands that are written down, not run: heads fail, whole blocks take too long."""
    commands = []

    def run(command, timeout, **options):
        command = [str(word) for word in command]
        commands.append(command)
        if "local_block" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int("head" in command))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/bin/{name}")
    return commands


def test_every_part_in_its_order(check, commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main([])
    assert stopped.value.code == 1  # for the heads
    printed = capsys.readouterr().out
    assert printed.count("FAILED (1)") == printed.count("stopped: no time") == 4  # two dtypes, without and with compile
    assert "pytest" in commands[0] and any(word.endswith("test_pooled_cross_entropy.py") for word in commands[0])
    assert [command[2] for command in commands if command[0].endswith("compute-sanitizer")] == ["memcheck", "racecheck"]
    bench = importlib.import_module("bench_kernels")
    measured = {(c[c.index("--op") + 1], c[c.index("--dtype") + 1]) for c in commands if "--op" in c}
    assert measured == {(op, dtype) for op in bench.OPS for dtype in bench.DTYPES}
    files = [c[c.index("--json") + 1] for c in commands if "--json" in c]
    assert len(files) == len(set(files)) and any(f.endswith("results/head_fp32_nvidia_h200.json") for f in files)


def test_no_time_and_parts_left_out(check, commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main(["--minutes", "0", "--skip", "benchmarks", "compiled"])
    assert not commands and stopped.value.code == 0
    assert capsys.readouterr().out.count("left out: no time") == 3


def test_without_a_gpu(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        check.main([])
