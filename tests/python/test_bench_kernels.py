"""The benchmark program: its smallest run, and that what it compares computes the same."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch

OPS = ["local_block", "head", "max_pool", "conv_batch_norm_act", "batch_norm_act"]
TABLES = ["SHAPES", "STEMS", "CONVOLUTIONS", "HEADS", "BLOCKS"]


@pytest.fixture
def bench(monkeypatch):
    """The program with the smallest of its shapes, and graphs run as torch.compile traces them, not compiled."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    program = importlib.import_module("bench_kernels")
    for name in TABLES:
        table = {name: case for name, case in getattr(program, name)["cpu"].items() if " at 224" not in name}
        smallest = dict([list(table.items())[-1]]) if table else {"ResNet stem": (2, 4, 12, 12)}
        monkeypatch.setitem(getattr(program, name), "cpu", smallest)
    traced = functools.partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(program, "COMPILERS", dict.fromkeys(program.COMPILERS, traced))
    yield program
    torch.compiler.reset()


def test_the_smallest_run(bench, tmp_path, capsys):
    options = ["--device", "cpu", "--batch", "2", "--seconds", "0", "--cases", "contiguous"]
    bench.main(["--op", "all", *options, "--json", str(tmp_path / "of" / "{op}.json")])
    printed = capsys.readouterr().out
    assert list(bench.OPS) == OPS
    for op in OPS:
        written = json.loads((tmp_path / "of" / f"{op}.json").read_text())
        assert written["op"] == op and written["torch"] == torch.__version__ and written["commit"]
        rows = written["rows"]
        assert {row["provider"] for row in rows} == {"auglocal_ext", "eager", "compile", "compile max-autotune"}
        for row in rows:
            assert f"{row['case']} " in printed
            whole = op == "local_block"  # which has no forward and backward of their own
            assert (row["forward_ms"] is None) == (row["gb_per_s"] is None) == whole
            assert row["both_ms"] > 0 and row["peak_bytes"] > 0


@pytest.mark.parametrize("op", OPS)
def test_providers_compute_the_same(bench, op):
    for case in bench.OPS[op]("cpu", torch.float32, 4):
        results = {}
        for provider, run in case.run.items():
            if case.grads is None:  # a step at a time: the second one's loss tells what the first one trained
                results[provider] = [value for _ in range(3) for value in run()]
            else:
                output = run()
                results[provider] = [output, *torch.autograd.grad(output, case.inputs, case.grads)]
        torch.compiler.reset()
        for provider, values in results.items():
            for ours, eager in zip(values, results["eager"], strict=True):
                error = (ours - eager).norm() / eager.norm()
                assert error < 1e-3, (case.name, provider, error)


def test_one_provider_alone_and_a_file_for_all_ops(bench, capsys):
    options = ["--device", "cpu", "--batch", "2", "--seconds", "0", "--cases", "stage 3, batch 2, contiguous"]
    bench.main([*options, "--providers", "auglocal_ext"])
    assert capsys.readouterr().out.count(" auglocal_ext  ") == 2
    with pytest.raises(SystemExit):
        bench.main(["--op", "all", "--json", "figures.json"])
    assert "--json must have {op} in it" in capsys.readouterr().err
