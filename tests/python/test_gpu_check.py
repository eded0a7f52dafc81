"""The program of everything that only a GPU can tell: what it would run, and what it says without one."""

import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import auglocal_ext  # noqa: F401  its ops

WITH_DEVICE = r'\("device", (?:D|\[CUDA)'


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("gpu_check")


@pytest.fixture
def commands(monkeypatch):
    """A GPU, and commands that are written down, not run: bf16 fails, fp32 takes too long and is killed."""
    commands = []

    class Process:
        def __init__(self, command, **options):
            assert options["start_new_session"]
            self.command, self.pid = [str(word) for word in command], len(commands)
            commands.append(self.command)

        def wait(self, timeout=None):
            if "fp32" in self.command and timeout is not None:
                raise subprocess.TimeoutExpired(self.command, timeout)
            return int("bf16" in self.command)

    def kill(group, number):
        assert "fp32" in commands[group] and number == signal.SIGKILL

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("os.killpg", kill)
    monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/bin/{name}")
    return commands


def test_every_part_in_its_order(check, commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main([])
    assert stopped.value.code == 1  # for bf16
    printed = capsys.readouterr().out
    assert printed.count("FAILED (1)") == printed.count("stopped: no time") == 2  # without and with compile
    assert "pytest" in commands[0] and {"-m", "cuda", "--long"} < set(commands[0])
    assert [command[2] for command in commands if command[0].endswith("compute-sanitizer")] == ["memcheck", "racecheck"]
    for command in commands[1:3]:
        given = [command[index + 1] for index, word in enumerate(command) if word == "--kernel-name"]
        assert given == [f"kns={name}" for name in check.KERNELS]  # apart: in one option a kernel had to fit them all
    bench = importlib.import_module("bench_kernels")
    measured = [(c[c.index("--op") + 1], c[c.index("--dtype") + 1]) for c in commands if "--op" in c]
    assert measured == [("all", dtype) for dtype in bench.DTYPES] * 2
    assert commands.index(next(c for c in commands if "--op" in c)) == 3  # correctness first
    assert printed.splitlines()[-1] == (
        "left: python python/gpu_check.py --minutes 60 --skip tests sanitizer"
    )  # what took too long
    files = [c[c.index("--json") + 1] for c in commands if "--json" in c]
    assert len(files) == len(set(files)) and any(f.endswith("results/{op}_fp32_nvidia_h200.json") for f in files)


def test_no_time_and_parts_left_out(check, commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main(["--minutes", "0", "--skip", "benchmarks", "compiled"])
    assert not commands and stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count("left out: no time") == 3
    assert printed.splitlines()[-1] == "left: python python/gpu_check.py --minutes 60 --skip benchmarks compiled"


def test_without_a_gpu(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        check.main([])


def test_the_tests_of_every_op_are_collected_by_what_they_are(check):
    """Every test that takes a device takes CUDA, under the marker that the program asks for; no op is without one; and
    the program knows where they are."""
    tests = Path(__file__).resolve().parents[1]
    # Where neither is named, nothing is marked; those files need not be imported.
    may_be = [file for file in tests.rglob("test_*.py") if re.search("cuda|ops_helpers", file.read_text())]
    command = [sys.executable, "-m", "pytest", "--long", "--collect-only", "-q", "-m", "cuda", *sorted(may_be)]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent).stdout.splitlines()
    collected = [name for name in collected if name.startswith("tests/")]  # warnings name tests too
    files = {tests.parent / name.split("::")[0] for name in collected}
    takes_a_device = {file for file in tests.rglob("test_*.py") if "\nfrom ops_helpers import" in file.read_text()}
    takes_a_device = {file for file in takes_a_device if re.search(WITH_DEVICE, file.read_text())}
    assert takes_a_device and takes_a_device <= files
    assert all(any(file.is_relative_to(place) for place in check.TESTS) for file in files)
    parametrized = sum(len(re.findall(WITH_DEVICE, file.read_text())) for file in takes_a_device)
    functions = {name.split("[")[0] for name in collected if "cuda" in name.partition("[")[2]}
    assert len(functions) == parametrized
    tested = "".join(file.read_text() for file in files)
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("auglocal_ext::")]
    assert len(ops) >= 16
    for op in ops:
        assert op.removeprefix("auglocal_ext::") in tested, op
