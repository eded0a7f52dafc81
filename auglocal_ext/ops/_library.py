"""The `auglocal_ext` operator library: schemas are defined here from Python, so that every op exists
with or without a compiler; the compiled kernels, where they were built, then serve CPU and CUDA."""

import os
import warnings
from functools import cache, wraps
from pathlib import Path

import torch

from ..common.messages import first_line

LIBRARY = torch.library.Library("auglocal_ext", "DEF")
_PACKAGE = Path(__file__).resolve().parents[1]


def define(schema, fallback):
    """Defines an op. `fallback`, in plain torch, serves every device that has no compiled kernel."""

    def plain(x, *args):
        _say_once_what_is_slower(x.device.type)
        return fallback(x, *args)

    define_composite(schema)(plain)


def define_composite(schema):
    """Defines an op by a function that calls other ops, the same on every device; a decorator."""

    def implement(function):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        LIBRARY.impl(schema[: schema.index("(")], without_autocast(function), "CompositeExplicitAutograd")
        return function

    return implement


def without_autocast(function):
    """The same function, in which torch.autocast changes no dtype: an op's results are of the dtypes that it tells."""

    @wraps(function)
    def run(x, *args):
        device = x.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(x, *args)
        with torch.autocast(device, enabled=False):
            return function(x, *args)

    return run


def not_differentiable(*names):
    """Makes differentiating these ops an error; without it torch would give zero gradients and a warning."""

    def refuse(name):
        def backward(ctx, *grads):
            raise RuntimeError(
                f"auglocal_ext::{name} is not differentiable (batch_norm_act and its kin are not differentiable "
                f"twice); use the op's _reference, which is"
            )

        torch.library.register_autograd(f"auglocal_ext::{name}", backward)

    for name in names:
        refuse(name)


def _load(file, wanted):
    """Loads one library of kernels; returns None, or why its kernels are not there."""
    if os.environ.get("AUGLOCAL_NATIVE") == "0":
        return "AUGLOCAL_NATIVE=0 is set"
    if not wanted:
        return "this torch has no CUDA"
    if not (_PACKAGE / file).exists():
        return "they were not built when auglocal_ext was installed"
    try:
        torch.ops.load_library(str(_PACKAGE / file))
    except OSError as error:
        return f"{file} does not load ({error})"
    return None


# Device type -> why it has no compiled kernels (None: it has them).
MISSING = {
    "cpu": _load("libauglocal_ext.so", True),
    "cuda": _load("libauglocal_ext_cuda.so", torch.version.cuda is not None),
}


@cache
def _say_once_what_is_slower(device):
    reason = MISSING.get(device, "none are written for this device") or "this op has none for this device"
    tool = "nvcc" if device == "cuda" else "a C++ compiler"
    fix = (
        f"Put {tool} on the PATH and run `pip install -v -e .` again; -v shows what the build found."
        if device in MISSING
        else "Kernels exist for cpu and cuda."
    )
    _say_slower(device, f"no compiled kernels, {reason}. {fix}")


def _say_slower(device, reason):
    warnings.warn(
        f"auglocal_ext runs its fused ops in plain torch on {device}: same results, more time. Reason: {reason}",
        stacklevel=3,
    )


@cache
def triton_works():
    """Whether Triton can start kernels, for which it compiles a file of its own by the machine's C compiler; says why
    not."""
    import triton

    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:
        fix = "Put a C compiler on the PATH, and Python's headers beside it."
        _say_slower("cuda", f"Triton cannot start its kernels ({type(error).__name__}: {first_line(error)}). {fix}")
        return False
    return True
