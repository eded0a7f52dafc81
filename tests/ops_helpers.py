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
# Shapes and dtypes that a registration is checked with, by tracing, which takes long.
REGISTERED = [
    ((2, 3, 4, 5), torch.float32),
    ((2, 3, 4, 5), torch.bfloat16),
    ((2, 1, 1, 1), torch.float32),
    ((0, 3, 2, 2), torch.bfloat16),
]


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


def rounding(dtype=torch.float32, size=1.0, terms=0.0):
    """The error that rounding alone may make in a sum of that size. Tests allow it where twice torch's error is less:
    against torch's error alone a correct kernel fails wherever torch happens to be lucky.

    Take n terms of size t, each the outcome of a few float32 operations. Each is off by about an ulp of t (2^-23 t), up
    or down, so all of them by sqrt(n) ulps of t. Added by halves they are rounded once more a level, at each by half an
    ulp at most, 0.3 in the root of the mean square: the n / 2^k sums of level k are of size sqrt(2^k) t, so together
    they are off by 0.3 sqrt(n) ulps of t again, and 16 such levels by sqrt(16) times that. The root of the sum of both
    squares is 1.6: 2 sqrt(n) ulps of t are allowed. Where signs are random, as in these tests, sqrt(n) t is the sum's
    size, so that is 2 ulps of it; and half an ulp of `dtype`, in which the sum is stored.

    One term after another in a single float32 is off by sqrt(n / 24) ulps of the sum, too much from n = 150 on.

    terms: by how much sqrt(n) t is more than the size, where terms cancel.
    """
    return torch.finfo(dtype).eps / 2 * size + 2 * torch.finfo(torch.float32).eps * (size + terms)
