"""What a piece of code holds at its peak, counted from tensors' births and deaths; its arithmetic; sizes in words."""

import re
import resource
import sys
import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

__all__ = [
    "LiveBytes",
    "MultiplyAccumulates",
    "bytes_of",
    "format_bytes",
    "parse_bytes",
    "process_bytes",
    "tensors_of",
]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that lives while the mode is on, on any device.

    with LiveBytes(existing) as live:   # existing: tensors that live already, parameters for instance
        step()
    live.peak                           # bytes at the highest moment, existing ones included

    Counts what operators return; scratch inside one operator is not seen.
    """

    def __init__(self, existing=()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {}  # id of a storage that lives -> a reference that tells of its death
        for tensor in existing:
            self.count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result

    def count(self, tensor):
        """Counts a tensor's storage from now on, until it dies."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._release, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key, size, _dead):
        del self._seen[key]
        self.now -= size


class MultiplyAccumulates(TorchDispatchMode):
    """Counts the multiply-accumulates of the convolutions and matrix products that are called while the mode is on, by
    torch's formulas, those of torch.utils.flop_counter.FlopCounterMode, which counts an addition and a product as two.

    count: so far.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        return result


def tensors_of(module):
    """A module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def process_bytes(device):
    """The most that this process has held so far: on a GPU what torch's allocator had reserved there, else resident
    memory, libraries and data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def format_bytes(count):
    """1234567 -> '1.23 MB' (powers of ten)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def parse_bytes(text):
    """'6GB' -> 6_000_000_000; also MB, kB, B, GiB, MiB, KiB, fractions, and whole numbers of bytes."""
    sizes = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if isinstance(text, bool) or not found or found[2].lower() not in sizes or float(found[1]) <= 0:
        raise ValueError(f"memory_budget must be a size such as '6GB', '500 MB' or '4GiB', given {text!r}")
    return int(float(found[1]) * sizes[found[2].lower()])
