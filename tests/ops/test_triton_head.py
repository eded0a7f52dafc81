"""The Triton kernels of linear_cross_entropy, without a GPU: their numbers in Triton's interpreter, and what the
compiler makes of them for sm_90. Run as a program under TRITON_INTERPRET=1 it prints the numbers as JSON."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops_helpers import CUDA, error, rounding

from auglocal_ext.ops import _fallbacks, _library, _linear_cross_entropy

if __name__ != "__main__":
    triton = pytest.importorskip("triton", reason="needs triton, which CPU builds of torch come without")

# N, C, K, bias, label_smoothing, ignore_index, labels, class weights
CASES = [
    (5, 7, 3, True, 0.0, -100, "numbers", False),
    (70, 40, 10, True, 0.1, -100, "numbers", False),
    (33, 65, 130, False, 0.1, 2, "numbers", False),
    (1, 1, 1, True, 0.0, 7, "numbers", False),
    (64, 32, 32, True, 1.0, -100, "numbers", False),
    (40, 9, 1000, True, 0.0, 1001, "numbers", False),
    (6, 4, 5, True, 0.1, -100, "one out of range", False),
    (300, 16, 10, False, 0.0, -100, "numbers", False),
    (70, 40, 10, True, 0.0, -100, "numbers", True),
    (33, 65, 130, False, 0.1, 2, "numbers", True),
    (6, 4, 5, True, 0.1, -100, "one out of range", True),
    (9, 4, 5, True, 0.1, -100, "all ignored", True),
    (9, 4, 5, True, 0.0, -100, "all ignored", False),
    (1, 1, 1, True, 0.1, -100, "soft", False),
    (70, 40, 10, True, 0.0, -100, "soft", False),
    (33, 65, 130, False, 0.1, -100, "soft", True),
    (40, 9, 64, True, 0.0, -100, "a tile masked", False),
    (40, 9, 40, True, 0.0, -100, "a tile masked", True),
]
NAMES = ["loss", "logits", "dpooled", "dweight", "dbias"]


def make_case(n, c, k, bias, label_smoothing, ignore_index, kind, weighted):
    generator = torch.Generator().manual_seed(n)
    pooled, weight, offset = (torch.randn(size, generator=generator) for size in [(n, c), (k, c), (k,)])
    labels = torch.randint(k, (n,), generator=generator)
    labels[slice(None) if kind == "all ignored" else slice(1, None, 3)] = ignore_index
    if kind == "one out of range":
        labels[0], labels[2], labels[3] = k, 2**62, -1
    if kind == "a tile masked":
        offset[32:], labels = -torch.inf, torch.where(labels < 0, labels, labels % 32)
    if kind == "soft":
        labels = torch.rand(n, k, generator=generator)
        labels[labels < 0.3] = 0
    class_weight = torch.rand(k, generator=generator) if weighted else None
    return pooled, weight, offset if bias else None, labels, label_smoothing, ignore_index, class_weight


def permute_the_programs(builder):
    """Lets the interpreter run the programs of each launch in an order of its own; returns the list of these orders."""
    set_dimensions, set_index, orders = builder.set_grid_dim, builder.set_grid_idx, []
    generator = torch.Generator().manual_seed(0)

    def set_grid_dim(*dimensions):
        set_dimensions(*dimensions)
        orders.append(tuple(torch.randperm(math.prod(dimensions), generator=generator).tolist()))

    def set_grid_idx(x, y, z):
        _, ny, nz = builder.grid_dim
        rest, z = divmod(orders[-1][(x * ny + y) * nz + z], nz)
        set_index(*divmod(rest, ny), z)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    return orders


def compared(ours, arguments):
    """{"errors": of each result relative to float64, and plain torch's; "nan": whether the losses are}."""
    plain = _fallbacks.linear_cross_entropy(*arguments)
    as_double = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    exact = _fallbacks.linear_cross_entropy(*as_double)
    assert all(torch.equal(a.isinf(), c.isinf()) for a, c in zip(ours, exact, strict=True))  # of masked classes
    results = [[torch.where(t.isinf(), 0, t) for t in result] for result in zip(ours, plain, exact, strict=True)]
    errors = [[error(a, c), error(b, c)] for a, b, c in results]
    return {"errors": errors, "nan": [bool(ours[0].isnan()), bool(exact[0].isnan())]}


def interpret():
    """Prints, a case a line, what `compared` says."""
    from triton.runtime import interpreter

    from auglocal_ext.ops import _triton_head

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy_2_4(tensor, *scope):  # github.com/triton-lang/triton/issues/9171
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_for_numpy_2_4
    orders = permute_the_programs(interpreter.interpreter_builder)
    for case in CASES:
        arguments = make_case(*case)
        ours, *others = (_triton_head.linear_cross_entropy(*arguments) for _ in range(3))
        for other in others:  # in another order of programs, the same bits
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, other, strict=True))
        print(json.dumps(compared(ours, arguments)))
    assert len(set(orders)) > len(CASES)  # they were really different


@pytest.fixture(scope="module")
def interpreted():
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_numbers_in_the_interpreter(interpreted, index):
    assert_right(interpreted[index], CASES[index])


def assert_right(found, case):
    """found: see `compared`."""
    assert found["nan"][0] == found["nan"][1] == (case[6] in ("one out of range", "all ignored"))
    for name, (ours, plain) in zip(NAMES, found["errors"], strict=True):
        if name != "loss" or not found["nan"][0]:
            assert ours <= max(2 * plain, rounding()), name


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("case", CASES)
def test_numbers_on_a_gpu(case, device):
    if os.environ.get("AUGLOCAL_NATIVE") == "0":
        pytest.skip("AUGLOCAL_NATIVE=0 is set")
    assert _library.triton_works()
    arguments = make_case(*case)
    there = [value.to(device) if torch.is_tensor(value) else value for value in arguments]
    found = compared([value.cpu() for value in torch.ops.auglocal_ext.linear_cross_entropy(*there)], arguments)
    assert_right(found, case)


INTEGERS = {"n", "k", "c", "ignore_index", "run", "runs"}
TYPES = dict.fromkeys(INTEGERS, "i32") | {"labels": "*i64", "label_smoothing": "fp32"}


@pytest.mark.parametrize("classes", [16, 32])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["logits_kernel", "dpooled_kernel", "dweight_kernel", "sums_kernel"])
def test_compiled_for_sm_90(name, soft, classes, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from auglocal_ext.ops import _triton_head

    sizes = {"ROWS": _triton_head.ROWS, "CLASSES": classes, "CHANNELS": _triton_head.CHANNELS}
    sizes |= {"LABELS": _triton_head.LABELS, "HAS_BIAS": True, "SOFT": soft, "RUNS": classes == 32}
    kernel = getattr(_triton_head, name)
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    types = TYPES | ({"labels": "*fp32"} if soft else {})
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source, warps = ASTSource(kernel, signature, constants, aligned), 4 if name == "sums_kernel" else _triton_head.WARPS
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    registers, stack, local = map(int, usage)
    # Two blocks of 256 threads share a multiprocessor: 65,536 registers; and shared memory for several more.
    assert registers <= 128 and (stack, local) == (0, 0), usage
    shared = (32 if soft else 24) * 1024  # targets are read ahead
    assert compiled.metadata.num_warps == warps and compiled.metadata.shared <= shared


def test_where_triton_cannot_start_kernels_plain_torch_serves(monkeypatch):
    def fails():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=fails))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(_library, "triton_works", _library.triton_works.__wrapped__)  # as if it was not asked yet
    arguments = make_case(*CASES[0])
    with pytest.warns(UserWarning, match="plain torch on cuda: .* Triton cannot start its kernels .*find C compiler"):
        found = _linear_cross_entropy._triton(*arguments)
    assert all(map(torch.equal, found, _fallbacks.linear_cross_entropy(*arguments)))


@pytest.mark.cuda
def test_cuda_is_served_by_triton():
    if os.environ.get("AUGLOCAL_NATIVE") == "0":
        pytest.skip("AUGLOCAL_NATIVE=0 is set")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("auglocal_ext::linear_cross_entropy", "CUDA")


if __name__ == "__main__":
    interpret()
