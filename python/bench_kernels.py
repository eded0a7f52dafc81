"""Microbenchmarks of the fused ops against eager torch and torch.compile.

    python python/bench_kernels.py [--op batch_norm_act|max_pool|head] [--device cpu|cuda] [--dtype fp32|bf16]

One table per op, headed by machine and versions. Times are medians of whole calls, forward, backward and both,
in milliseconds; GB/s counts the passes over the feature map that the op itself must make, and the share is of a
copy of the same bytes, measured in the same run; peak is what one forward and backward holds beyond its inputs.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from auglocal_ext import ops
from auglocal_ext.memory import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Feature maps (N, C, H, W) of the networks' stages.
SHAPES = {
    "cpu": {
        "ResNet-32 stage 1, batch 128": (128, 16, 32, 32),
        "ResNet-32 stage 2, batch 128": (128, 32, 16, 16),
        "ResNet-32 stage 3, batch 128": (128, 64, 8, 8),
    },
    "cuda": {
        "ResNet-32 stage 1, batch 1024": (1024, 16, 32, 32),
        "ResNet-32 stage 2, batch 1024": (1024, 32, 16, 16),
        "ResNet-32 stage 3, batch 1024": (1024, 64, 8, 8),
        "ResNet-34 stage 1, batch 256": (256, 64, 56, 56),
        "ResNet-34 stage 2, batch 256": (256, 128, 28, 28),
        "ResNet-34 stage 3, batch 256": (256, 256, 14, 14),
        "ResNet-34 stage 4, batch 256": (256, 512, 7, 7),
        "ResNet-101 stage 1, batch 256": (256, 256, 56, 56),
        "ResNet-101 stage 3, batch 256": (256, 1024, 14, 14),
    },
}


@dataclass(frozen=True)
class Case:
    """One thing to time: providers compute the same from the same tensors."""

    name: str
    forward: dict[str, Callable]  # provider -> () -> outputs that need a gradient
    inputs: list[torch.Tensor]  # what gradients are taken of
    grads: list[torch.Tensor]
    passes: tuple[float, float]  # over the feature map, forward and backward
    map_bytes: int


@dataclass(frozen=True)
class Row:
    case: str
    provider: str
    forward_ms: float
    backward_ms: float
    both_ms: float
    gb_per_s: float
    share_of_copy: float
    peak_bytes: int


def batch_norm_act_cases(device, dtype):
    """relu(BN(x)) and relu(BN(x) + residual), both layouts. Passes: what the kernel reads and writes where a
    second look at its input is free (on chip): 2 forward, 3 backward; a residual adds 1 and 2."""

    def eager(x, weight, bias, residual=None):
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return F.relu(y if residual is None else y + residual)

    def fused(x, weight, bias, residual=None):
        return ops.batch_norm_act(x, weight, bias, residual)[0]

    providers = {"auglocal_ext": fused, "eager": eager, **_compiled(eager, device)}
    for name, shape in SHAPES[device].items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for with_residual in (False, True):
                features = [torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(3)]
                x, residual = (t.requires_grad_() for t in features[:2])
                affine = [torch.rand(shape[1], device=device).requires_grad_() for _ in range(2)]
                inputs = [x, *affine, *([residual] if with_residual else [])]
                yield Case(
                    f"{name}, {_layout_name(layout)}{', residual' if with_residual else ''}",
                    {provider: _call(function, inputs) for provider, function in providers.items()},
                    inputs,
                    features[2:],
                    (3, 5) if with_residual else (2, 3),
                    x.nbytes,
                )


STEMS = {
    "cpu": {"ResNet stem at 224, batch 8": (8, 64, 112, 112)},
    "cuda": {"ResNet stem at 224, batch 256": (256, 64, 112, 112)},
}


def max_pool_cases(device, dtype):
    """The stem behind its convolution: max_pool2d(relu(BN(x)), 3, 2, 1). Passes: x read once and a quarter written
    forward, with a byte per output; x, the quarter and the bytes read and dx written backward."""

    def eager(x, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, training=True)), 3, 2, 1)

    def fused(x, weight, bias):
        return ops.batch_norm_act_max_pool(x, weight, bias, 3, 2, 1)[0]

    providers = {"auglocal_ext": fused, "eager": eager, **_compiled(eager, device)}
    for name, shape in STEMS[device].items():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_()
            inputs = [x, *(torch.rand(shape[1], device=device).requires_grad_() for _ in range(2))]
            grad = torch.randn_like(eager(*inputs).detach())
            index = 1 / 4 / x.itemsize
            yield Case(
                f"{name}, {_layout_name(layout)}",
                {provider: _call(function, inputs) for provider, function in providers.items()},
                inputs,
                [grad],
                (1.25 + index, 2.25 + index),
                x.nbytes,
            )


HEADS = {
    "cpu": {"ResNet-32, batch 128, 10 classes": ((128, 64, 8, 8), 10)},
    "cuda": {
        "ResNet-32, batch 1024, 10 classes": ((1024, 64, 8, 8), 10),
        "ResNet-34, batch 256, 10 classes": ((256, 512, 7, 7), 10),
        "ResNet-34, batch 256, 1000 classes": ((256, 512, 7, 7), 1000),
        "ResNet-101, batch 256, 1000 classes": ((256, 2048, 7, 7), 1000),
    },
}


def head_cases(device, dtype):
    """The head behind the last block: relu(BN(x) + residual), average pool, linear, cross-entropy. Passes: x and the
    residual read forward; both read and both gradients written backward."""

    def eager(x, weight, bias, residual, linear, labels):
        y = F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)
        return F.cross_entropy(F.linear(y.mean((2, 3)).to(linear.dtype), linear), labels)

    def fused(x, weight, bias, residual, linear, labels):
        return ops.pooled_cross_entropy(x, linear, None, labels, bn=(weight, bias), residual=residual).loss

    providers = {"auglocal_ext": fused, "eager": eager, **_compiled(eager, device)}
    for name, (shape, classes) in HEADS[device].items():
        for layout in (torch.contiguous_format, torch.channels_last):
            features = [torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(2)]
            affine = [torch.rand(shape[1], device=device) for _ in range(2)]
            linear = torch.randn(classes, shape[1], device=device) / shape[1] ** 0.5
            inputs = [t.requires_grad_() for t in (features[0], *affine, features[1], linear)]
            labels = torch.arange(shape[0], device=device) % classes
            yield Case(
                f"{name}, {_layout_name(layout)}",
                {provider: _call(function, [*inputs, labels]) for provider, function in providers.items()},
                inputs,
                [torch.ones((), device=device)],
                (2, 4),
                features[0].nbytes,
            )


OPS = {"batch_norm_act": batch_norm_act_cases, "max_pool": max_pool_cases, "head": head_cases}


def _layout_name(layout):
    return "channels_last" if layout == torch.channels_last else "contiguous"


def _call(function, inputs):
    return lambda: function(*inputs)


def _compiled(function, device):
    """torch.compile of the eager function; on the CPU max-autotune has nothing more to tune."""
    modes = {"compile": None} if device == "cpu" else {"compile": None, "compile max-autotune": "max-autotune"}
    return {name: torch.compile(function, mode=mode, dynamic=False) for name, mode in modes.items()}


def median_ms(run, device, seconds):
    """Median time of a call. On CUDA by events, the cache flushed between calls; on the CPU by the clock."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=1000 * seconds, return_mode="median")
    run()
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _backward_alone(output, case):
    return lambda: torch.autograd.grad(output, case.inputs, case.grads, retain_graph=True)


def measure(case, provider, device, seconds):
    forward = case.forward[provider]

    def both():
        return torch.autograd.grad(forward(), case.inputs, case.grads)

    def forward_alone():
        with torch.no_grad():
            return forward()

    backward_ms = median_ms(_backward_alone(forward(), case), device, seconds)
    forward_ms, both_ms = median_ms(forward_alone, device, seconds), median_ms(both, device, seconds)
    source = torch.empty(case.map_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, seconds)
    passes = sum(case.passes)
    return Row(
        case.name,
        provider,
        forward_ms,
        backward_ms,
        both_ms,
        gb_per_s=passes * case.map_bytes / both_ms / 1e6,
        share_of_copy=passes * copy_ms / 2 / both_ms,  # a copy is two passes
        peak_bytes=peak_bytes(both, device),
    )


def peak_bytes(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        run()
    return live.peak


def machine(device):
    """What a figure depends on besides the code."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].split(': ')[1]}, {torch.get_num_threads()} threads" if models else name
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def table(rows):
    """One line per case and provider; speed-up: time of eager torch over this provider's."""
    lines = [
        f"{'case':56} {'provider':22} {'fwd ms':>8} {'bwd ms':>8} {'both ms':>8} {'GB/s':>7} {'of copy':>8} "
        f"{'peak MB':>8} {'vs eager':>9}"
    ]
    eager = {row.case: row.both_ms for row in rows if row.provider == "eager"}
    for row in rows:
        lines.append(
            f"{row.case:56} {row.provider:22} {row.forward_ms:8.3f} {row.backward_ms:8.3f} {row.both_ms:8.3f} "
            f"{row.gb_per_s:7.1f} {row.share_of_copy:8.0%} {row.peak_bytes / 1e6:8.1f} "
            f"{eager[row.case] / row.both_ms:8.2f}x"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, default="batch_norm_act")
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--providers", nargs="+", help="only these (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time per figure")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    about = {"op": options.op, "dtype": options.dtype, **machine(options.device)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for case in OPS[options.op](options.device, DTYPES[options.dtype]):
        unknown = set(options.providers or ()) - set(case.forward)
        if unknown:
            parser.error(f"--providers must be of {', '.join(case.forward)}, given {', '.join(sorted(unknown))}")
        for provider in options.providers or case.forward:
            rows.append(measure(case, provider, options.device, options.seconds))
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
