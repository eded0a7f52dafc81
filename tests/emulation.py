"""The CUDA kernels on the CPU: builds csrc/emulation with the .cu files, and lets the ops of CPU tensors run on it.

No GPU and nothing but a C++ compiler is needed, and torch's headers. The library is kept in build/emulation, under a
name made of everything it was built from.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from auglocal_ext.ops.batch_norm_act import _backward

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("batch_norm_act", "batch_norm_act_max_pool", "batch_norm_act_mean")
OPS = (
    "batch_norm_statistics",
    "batch_norm_act",
    "batch_norm_act_apply_out",
    "batch_norm_act_backward_out",
    "batch_norm_act_max_pool_apply",
    "batch_norm_act_max_pool_backward_out",
    "batch_norm_act_mean_apply",
    "batch_norm_act_mean_backward_out",
)
DEVICES = ("sm_80", "sm_90", "a slice of sm_80", "a slice of sm_90", "a large slice of sm_90")  # as in machine.cpp
CHECKS = "thread,alignment,signed-integer-overflow,bounds,shift,integer-divide-by-zero"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = [
    *("-O1", "-x", "c++", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-fsanitize={CHECKS}"),
    *("--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"),
]


def compiler():
    """The C++ compiler, or None; it has to be GCC, whose calls before accesses machine.cpp answers."""
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        return None
    defined = subprocess.run([cxx, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    return cxx if "__GNUC__" in defined and "__clang__" not in defined else None


def build(csrc=ROOT / "csrc", into=ROOT / "build" / "emulation"):
    """Builds the library from a csrc folder, unless it is there; returns its path."""
    sources = sorted(file for file in Path(csrc).rglob("*") if file.suffix in (".h", ".cuh", ".cu", ".cpp"))
    name = hashlib.sha256(repr((FLAGS, KERNEL_FLAGS, torch.__version__)).encode())
    for file in sources:
        if "cpu" not in file.parts and "planner" not in file.parts:
            name.update(file.read_bytes())
    library = Path(into) / f"libauglocal_emulation_{name.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    cxx, packaged = compiler(), Path(torch.__path__[0])

    machine = [cxx, *FLAGS, "-O2", Path(csrc) / "emulation" / "machine.cpp"]
    jobs = [machine, *([cxx, *FLAGS, *KERNEL_FLAGS, Path(csrc) / "cuda" / f"{kernel}.cu"] for kernel in KERNELS)]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        outputs, running = [], []
        for job in jobs:
            command = [*map(str, job), "-I", str(Path(csrc) / "emulation"), "-isystem", str(packaged / "include")]
            outputs.append(Path(folder) / f"{Path(job[-1]).stem}.o")
            running.append(subprocess.Popen([*command, "-c", "-o", str(outputs[-1])]))
            if len(running) == 2:
                finish(running.pop(0))
        for process in running:
            finish(process)
        linked = Path(folder) / library.name
        link = [cxx, "-shared", "-o", linked, *outputs, f"-L{packaged / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs"]
        subprocess.run(link, check=True)
        linked.replace(library)
    return library


def finish(process):
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


class Emulation:
    """The loaded library. One a process: its ops, auglocal_emulated, are torch's until it ends."""

    def __init__(self, library):
        self.definitions = torch.library.Library("auglocal_emulated", "DEF")
        for name in OPS:
            schema = str(getattr(torch.ops.auglocal_ext, name).default._schema)
            self.definitions.define(schema.removeprefix("auglocal_ext::"))
        torch.ops.load_library(str(library))
        self.machine = ctypes.CDLL(str(library))
        self.machine.emulation_launches.restype = ctypes.c_int64

    @contextlib.contextmanager
    def running(self, seed=0, device="a slice of sm_80"):
        """The ops of CPU tensors run on the emulated device; memory is poisoned and its bounds are kept."""
        served = torch.library.Library("auglocal_ext", "IMPL")
        for name in OPS:
            op = getattr(torch.ops.auglocal_emulated, name).default
            served.impl(name, lambda *arguments, op=op: op(*arguments), "CPU", allow_override=True)
        # On CUDA, this one is put together from others.
        served.impl("batch_norm_act_backward", _backward, "CPU", allow_override=True)
        self.machine.emulation_begin(seed, DEVICES.index(device))
        try:
            yield self
        finally:
            self.machine.emulation_end()
            served._destroy()

    def launches(self):
        return self.machine.emulation_launches()
