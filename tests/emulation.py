"""The CUDA kernels on the CPU: builds csrc/emulation with the .cu files, and lets the ops of CPU tensors run on it.

No GPU and nothing but a C++ compiler is needed, and torch's headers. The library is kept in build/emulation, under a
name made of everything it was built from. Of processes that want it at once, one builds it and the others wait.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *("cuda/batch_norm_act_mean.cu", "cuda/batch_norm_act.cu", "cuda/batch_norm_act_max_pool.cu"),
    *("emulation/faults.cu", "emulation/machine.cpp"),
]
OPS = (
    "batch_norm_statistics",
    "batch_norm_act",
    "batch_norm_act_apply_out",
    "batch_norm_act_backward_out",
    "batch_norm_act_backward_sums",
    "batch_norm_act_backward_apply_out",
    "batch_norm_act_backward",
    "batch_norm_act_max_pool_apply",
    "batch_norm_act_max_pool_backward_out",
    "batch_norm_act_mean_apply",
    "batch_norm_act_mean_backward_out",
)
DEVICES = ("sm_80", "sm_90", "a slice of sm_80", "a slice of sm_90", "a large slice of sm_90")  # as in machine.cpp
CHECKS = "thread,alignment,signed-integer-overflow,bounds,shift,integer-divide-by-zero"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = [
    *("-Og", "-x", "c++", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-fsanitize={CHECKS}"),
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
    """Builds the library from a csrc folder, as far as that was not done before; returns its path."""
    into = Path(into)
    into.mkdir(parents=True, exist_ok=True)
    with open(into / "lock", "w") as lock:  # let go of where it is closed, or its process is killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_alone(Path(csrc), into)


def build_alone(csrc, into):
    cxx, torchs = compiler(), Path(torch.__path__[0])
    headers = [*csrc.glob("*.h"), *csrc.glob("ops/*.h"), *csrc.glob("cuda/*.cuh"), *csrc.glob("emulation/*.h")]
    same = [torch.__version__, cxx, *(file.read_text() for file in sorted(headers))]

    def named(stem, suffix, *made_of):
        return into / f"{stem}_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}{suffix}"

    objects, running = [], []
    for source in SOURCES:
        flags = [*FLAGS, *(KERNEL_FLAGS if source.endswith(".cu") else ["-O2"])]
        objects.append(named(Path(source).stem, ".o", same, flags, (csrc / source).read_text()))
        if objects[-1].exists():
            continue
        if len(running) == 2:
            finish(*running.pop(0))
        partial = f"{objects[-1]}.{os.getpid()}"
        command = [cxx, *flags, csrc / source, "-I", csrc / "emulation", "-isystem", torchs / "include"]
        running.append((subprocess.Popen([*command, "-c", "-o", partial]), partial, objects[-1]))
    for job in running:
        finish(*job)
    library = named("libauglocal_emulation", ".so", [file.name for file in objects])
    if not library.exists():
        partial = f"{library}.{os.getpid()}"
        link = [cxx, "-shared", "-o", partial, *objects, f"-L{torchs / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs"]
        finish(subprocess.Popen(link), partial, library)
    return library


def finish(process, partial, whole):
    """Waits for a compiler; only then the file has its name, which another run may look for."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    os.replace(partial, whole)


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
    def running(self, seed=0, device="a slice of sm_80", last_blocks=0):
        """The ops of CPU tensors run on the emulated device; memory is poisoned and its bounds are kept.

        last_blocks: if not 0, only so many of a grid are run, unless they wait for one another. Tensors from 64 MB are
        then affordable: they are zeros, take no memory before they are touched, and races in them are not looked for.
        """
        served = torch.library.Library("auglocal_ext", "IMPL")
        for name in OPS:
            op = getattr(torch.ops.auglocal_emulated, name).default
            served.impl(name, lambda *arguments, op=op: op(*arguments), "CPU", allow_override=True)
        self.machine.emulation_begin(seed, DEVICES.index(device))
        self.machine.emulation_run_last_blocks(last_blocks)
        try:
            yield self
        finally:
            self.machine.emulation_end()
            served._destroy()

    def launches(self):
        return self.machine.emulation_launches()
