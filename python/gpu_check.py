"""Everything that only a GPU can tell, in one command: tests on CUDA, compute-sanitizer, the benchmarks.

    python python/gpu_check.py [--out benchmarks/results] [--minutes 9] [--skip tests sanitizer benchmarks compiled]

In this order: every test that is marked as needing a GPU, of the ops and of trainings; compute-sanitizer over a
selection that launches every kernel, Triton's too, for at most a third of the time; every benchmark against eager
torch; the benchmarks' channels_last cases once more with torch.compile beside, whose tuning takes most of the time.
Nine minutes are meant for an H100. What they do not suffice for is stopped or left out, and the last line says how to
run what is left. One JSON per benchmark, with device, versions and commit, written anew after each case; at the end a
line per part.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "sanitizer", "benchmarks", "compiled")
OPS = ROOT / "tests" / "ops"
TESTS = [OPS, ROOT / "tests" / "training" / "test_on_a_gpu.py"]  # all files that have some that need a GPU
# Small, so that the sanitizer, which slows a kernel down a hundredfold, sees every kernel.
SANITIZED = "opcheck or equals_the_reference or in_place or rebuilds or labels_out_of_range or numbers_on_a_gpu"
# Our kernels alone: those of torch's libraries are not looked at, which takes long and finds what is not ours.
KERNELS = ("auglocal", "logits_kernel", "dpooled_kernel", "dweight_kernel", "sums_kernel")
SANITIZER = ["--error-exitcode", "1", "--launch-timeout", "0"]
SANITIZER += [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]  # a kernel that fits one of them


class Checks:
    """Runs parts one after another until the time is up; their output goes to the terminal as it comes."""

    def __init__(self, minutes):
        self.seconds = 60 * minutes
        self.until = time.perf_counter() + self.seconds
        self.part = None
        self.left = []  # parts that were not finished
        self.results = []  # (name, outcome, seconds)

    def run(self, name, command, share=1.0, **environment):
        """share: of all the time, that this may take at most."""
        started = time.perf_counter()
        if started > self.until:
            self.results.append((name, "left out: no time", 0.0))
            self.left.append(self.part)
            return
        print(f"== {name}: {' '.join(map(str, command))}", flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
        try:
            status = process.wait(min(self.until - started, share * self.seconds))
            outcome = "ok" if status == 0 else f"FAILED ({status})"
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too, which would run beside what comes next
            process.wait()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
            outcome = "stopped: no time"
            self.left.append(self.part)
        self.results.append((name, outcome, time.perf_counter() - started))


def sanitize(checks, command):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            checks.results.append((tool, "left out: no compute-sanitizer", 0.0))
            continue
        options, environment = [*SANITIZER], {}
        if tool == "memcheck":
            # Each tensor an allocation of its own: within one of torch's large ones, between tensors, nothing is out
            # of bounds. Calls of the driver that fail are torch's way to find out what there is.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            options += ["--report-api-errors", "no"]
        checks.run(tool, [sanitizer, "--tool", tool, *options, *command], share=1 / 6, **environment)


def benchmark(checks, folder, suffix, *selection):
    import torch

    device = torch.cuda.get_device_name().replace(" ", "_").lower()
    bench = [sys.executable, ROOT / "python" / "bench_kernels.py", "--device", "cuda", "--seconds", "0.1", *selection]
    for dtype in ("fp32", "bf16"):  # all ops in one process: to start one takes as long as to measure an op
        file = folder / f"{{op}}_{dtype}_{device}{suffix}.json"
        checks.run(f"benchmarks {dtype}{suffix}", [*bench, "--op", "all", "--dtype", dtype, "--json", file])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS)
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        sys.exit("this needs a GPU that torch can use: torch.cuda.is_available() is False here")

    checks = Checks(options.minutes)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "cuda"]
    several = ["-n", "8"] if find_spec("xdist") else []
    for part in PARTS:
        if part in options.skip:
            continue
        checks.part = part
        if part == "tests":
            checks.run("tests", [*pytest, "--long", *several, *TESTS])
        elif part == "sanitizer":
            sanitize(checks, [*pytest, "-p", "no:xdist", "-x", "-k", SANITIZED, OPS])
        elif part == "benchmarks":
            benchmark(checks, options.out, "", "--providers", "auglocal_ext", "eager")
        else:
            benchmark(checks, options.out, "_compiled", "--cases", "channels_last")

    for name, outcome, seconds in checks.results:
        print(f"{name:56} {outcome:32} {seconds:7.1f} s")
    if checks.left:
        done = [part for part in PARTS if part not in checks.left]
        print("left: python python/gpu_check.py --minutes 60" + " --skip" * bool(done), *done)
    sys.exit(any(outcome.startswith("FAILED") for _, outcome, _ in checks.results))


if __name__ == "__main__":
    main()
