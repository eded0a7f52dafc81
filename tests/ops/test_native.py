"""How the compiled kernels are found, and what is said where they are not."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import auglocal_ext
from auglocal_ext.ops import _library

CUDA_LIBRARY = Path(auglocal_ext.__file__).with_name("libauglocal_ext_cuda.so")


@pytest.fixture
def cuobjdump():
    """Runs cuobjdump, which triton brings, on the compiled CUDA kernels."""
    if not CUDA_LIBRARY.exists():
        pytest.skip("the CUDA kernels are not built here: no nvcc, or a CPU build of torch")
    triton = pytest.importorskip("triton", reason="triton brings cuobjdump")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def run(*options):
        return subprocess.run([tool, *options, CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout

    return run


@pytest.mark.cuda
@pytest.mark.skipif("CUDAARCHS" in os.environ, reason="built for the architectures that CUDAARCHS names")
def test_cuda_kernels_are_compiled_for_sm_80_and_sm_90(cuobjdump):
    assert set(re.findall(r"sm_\d+", cuobjdump("--list-elf"))) == {"sm_80", "sm_90"}


@pytest.mark.cuda
def test_no_cuda_kernel_spills(cuobjdump):
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("--dump-resource-usage")
    )
    assert len(usage) >= 140
    for name, registers, stack, shared, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        # Two blocks of 256 threads share a multiprocessor: 65,536 registers, and shared memory besides the kept.
        assert int(registers) <= 128 and int(shared) <= 12 * 1024, name


def test_why_kernels_are_missing(tmp_path, monkeypatch):
    assert "not built" in _library._load("libnowhere.so", True)
    assert _library._load("libauglocal_ext_cuda.so", False) == "this torch has no CUDA"
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    (tmp_path / "libbroken.so").write_bytes(b"not a library")
    assert "libbroken.so does not load" in _library._load("libbroken.so", True)
    monkeypatch.setenv("AUGLOCAL_NATIVE", "0")
    assert _library._load("libauglocal_ext.so", True) == "AUGLOCAL_NATIVE=0 is set"


def test_the_warning_is_given_once_a_device(recwarn):
    _library._say_once_what_is_slower.cache_clear()
    for _ in range(2):
        _library._say_once_what_is_slower("cuda")
        _library._say_once_what_is_slower("xpu")
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == 2
    assert "in plain torch on cuda" in texts[0] and "Put nvcc on the PATH" in texts[0]
    assert "none are written for this device" in texts[1] and "Kernels exist for cpu and cuda." in texts[1]
    _library._say_once_what_is_slower.cache_clear()


def test_ops_of_another_device_run_in_plain_torch():
    x = torch.empty(2, 3, 4, 4, device="meta")
    affine = torch.empty(3, device="meta")
    y, mean, _ = torch.ops.auglocal_ext.batch_norm_act(x, affine, affine, None, 1e-5, True)
    assert y.shape == x.shape and mean.shape == (3,)
