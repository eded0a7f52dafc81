"""Everything that only a GPU can tell, in one command: the op tests on CUDA, compute-sanitizer, the benchmarks.

    python python/gpu_check.py [--out benchmarks/results] [--minutes 10] [--skip tests sanitizer benchmarks compiled]

In this order: every test that is marked as needing a GPU, which those of the ops are; compute-sanitizer over a
selection that launches every kernel, Triton's too, for at most a third of the time; every benchmark against eager
torch; the benchmarks' channels_last cases once more with torch.compile beside, whose tuning takes most of the time. Ten
minutes are meant for an H100. What they do not suffice for is stopped or left out, and the last line says how to run
what is left. One JSON per benchmark, with device, versions and commit; at the end a line per part.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "sanitizer", "benchmarks", "compiled")
BENCHMARKS = [
    (op, dtype)
    for dtype in ("fp32", "bf16")
    for op in ("local_block", "head", "max_pool", "conv_batch_norm_act", "batch_norm_act")
]
TESTS = [str(ROOT / "tests"), "-m", "cuda"]  # every test that says of itself that it needs a GPU
# Small, so that the sanitizer, which slows a kernel down a hundredfold, sees every kernel.
SANITIZED = "opcheck or equals_the_reference or in_place or rebuilds or labels_out_of_range"


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
        try:
            remaining = min(self.until - started, share * self.seconds)
            status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=remaining).returncode
            outcome = "ok" if status == 0 else f"FAILED ({status})"
        except subprocess.TimeoutExpired:
            outcome = "stopped: no time"
            self.left.append(self.part)
        self.results.append((name, outcome, time.perf_counter() - started))


def sanitize(checks, command):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            checks.results.append((tool, "left out: no compute-sanitizer", 0.0))
            continue
        # Each tensor an allocation of its own: between tensors in one of torch's large ones nothing is out of bounds.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        checks.run(tool, [sanitizer, "--tool", tool, "--error-exitcode", "1", *command], share=1 / 6, **environment)


def benchmark(checks, folder, suffix, *selection):
    import torch

    device = torch.cuda.get_device_name().replace(" ", "_").lower()
    bench = [sys.executable, ROOT / "python" / "bench_kernels.py", "--device", "cuda", "--seconds", "0.1", *selection]
    for op, dtype in BENCHMARKS:
        name = f"{op}_{dtype}_{device}{suffix}"
        checks.run(name, [*bench, "--op", op, "--dtype", dtype, "--json", folder / f"{name}.json"])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS)
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        sys.exit("this needs a GPU that torch can use: torch.cuda.is_available() is False here")

    checks = Checks(options.minutes)
    pytest = [sys.executable, "-m", "pytest", "--long", "-q", *TESTS]
    for part in PARTS:
        if part in options.skip:
            continue
        checks.part = part
        if part == "tests":
            checks.run("op tests", pytest)
        elif part == "sanitizer":
            sanitize(checks, [*pytest, "-x", "-k", SANITIZED])
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
