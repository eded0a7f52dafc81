"""What the tests of the ops share: devices, layouts, tensors, errors."""

import pytest
import torch

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
)
# What a test of an op runs on. Emulated: the CUDA kernels, on CPU tensors (see emulation.py).
DEVICES = ["cpu", pytest.param("cpu", marks=pytest.mark.emulated, id="emulated"), CUDA]
DISPATCHED = ["cpu", CUDA]  # for tests of how an op is registered, which is the same for emulated kernels
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make(shape, dtype, layout, residual, *, device="cpu", mean=0.5, seed=0):
    """x, weight, bias, residual or None, and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)

    def features(offset=0.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
        return values.to(device, dtype).contiguous(memory_format=layout)

    affine = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    x, grad = features(mean), features()
    return x, weight.to(device, affine), bias.to(device, affine), features() if residual else None, grad


def error(given, exact):
    """Norm of the difference relative to the norm of the exact value."""
    return ((given.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
