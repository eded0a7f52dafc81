"""Everything that only a GPU can tell, in one command: the op tests on CUDA, compute-sanitizer, the benchmarks.

    python python/gpu_check.py [--out benchmarks/results] [--skip tests sanitizer benchmarks]

Writes one JSON per benchmark with device, versions and commit; ends with a line per part. Under ten minutes on an
H200. compute-sanitizer is used where it is on the PATH.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = [(op, dtype) for op in ("batch_norm_act", "max_pool", "head") for dtype in ("fp32", "bf16")]
TESTS = [*ROOT.glob("tests/test_*batch_norm_act*.py"), ROOT / "tests" / "test_pooled_cross_entropy.py"]
# Small, so that the sanitizer, which slows a kernel down a hundredfold, sees every kernel.
SANITIZED = "opcheck or equals_the_reference or in_place or rebuilds"


def run(name, command, results):
    """Runs one part; its output goes to the terminal as it comes."""
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    started = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT).returncode
    results.append((name, status, time.perf_counter() - started))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--skip", nargs="+", default=[], choices=("tests", "sanitizer", "benchmarks"))
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("this needs a GPU that torch can use: torch.cuda.is_available() is False here")

    results = []
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", *sorted(map(str, TESTS))]
    if "tests" not in options.skip:
        run("op tests", [*pytest, "-k", "cuda"], results)
    sanitizer = shutil.which("compute-sanitizer")
    if "sanitizer" not in options.skip and sanitizer:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, "-k", f"cuda and ({SANITIZED})"]
            run(tool, command, results)
    if "benchmarks" not in options.skip:
        name = torch.cuda.get_device_name().replace(" ", "_").lower()
        for op, dtype in BENCHMARKS:
            file = options.out / f"{op}_{dtype}_{name}.json"
            bench = [sys.executable, ROOT / "python" / "bench_kernels.py", "--device", "cuda", "--seconds", "0.1"]
            run(f"{op} {dtype}", [*bench, "--op", op, "--dtype", dtype, "--json", file], results)

    for name, status, seconds in results:
        print(f"{name:24} {'ok' if status == 0 else f'FAILED ({status})':12} {seconds:7.1f} s")
    sys.exit(any(status for _, status, _ in results))


if __name__ == "__main__":
    main()
