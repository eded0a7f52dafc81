"""Microbenchmarks of the fused ops, and of a whole local block, against eager torch and torch.compile.

    python python/bench_kernels.py [--op batch_norm_act|max_pool|conv_batch_norm_act|head|local_block|all]
                                   [--device cpu|cuda] [--dtype fp32|bf16] [--json FILE]

One table per op, headed by machine and versions. Times are medians of whole calls, forward, backward and both,
in milliseconds; GB/s counts the passes over the feature map that the op itself must make, and the share is of a
copy of the same bytes, measured in the same run; peak is the most that one forward and backward has allocated at a
time beyond what it was given. A column is empty where it has no meaning.
"""

import copy
import ctypes
import functools
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F

import auglocal_ext
from auglocal_ext import models, ops
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, number, whole
from auglocal_ext.common.device import usable_device
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.common.stopwatch import keep_gpu_busy

sys.path.insert(0, str(Path(__file__).parent))
from records import machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Whole graphs of fixed shapes, or an error. On CUDA max-autotune replays CUDA graphs, copying its inputs into them.
COMPILERS = {
    "compile": functools.partial(torch.compile, dynamic=False, fullgraph=True),
    "compile max-autotune": functools.partial(torch.compile, dynamic=False, fullgraph=True, mode="max-autotune"),
}


@dataclass(frozen=True)
class Case:
    """One thing to time: providers compute the same from the same values."""

    name: str
    run: dict[str, Callable]  # provider -> () -> outputs that need a gradient; without grads, the whole of it
    inputs: list[torch.Tensor] | None = None  # what gradients are taken of
    grads: list[torch.Tensor] | None = None
    passes: tuple[float, float] | None = None  # over the feature map, forward and backward
    map_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    case: str
    provider: str
    forward_ms: float | None
    backward_ms: float | None
    both_ms: float
    gb_per_s: float | None
    share_of_copy: float | None
    peak_bytes: int | None


# Feature maps (N, C, H, W) of the networks' stages, behind their blocks.
SHAPES = {
    "cpu": {
        "ResNet-32 stage 1": (128, 16, 32, 32),
        "ResNet-32 stage 2": (128, 32, 16, 16),
        "ResNet-32 stage 3": (128, 64, 8, 8),
    },
    "cuda": {
        "ResNet-32 stage 1": (1024, 16, 32, 32),
        "ResNet-32 stage 2": (1024, 32, 16, 16),
        "ResNet-32 stage 3": (1024, 64, 8, 8),
        "ResNet-34 stage 1": (256, 64, 56, 56),
        "ResNet-34 stage 2": (256, 128, 28, 28),
        "ResNet-34 stage 3": (256, 256, 14, 14),
        "ResNet-34 stage 4": (256, 512, 7, 7),
        "ResNet-101 stage 1": (256, 256, 56, 56),
        "ResNet-101 stage 3": (256, 1024, 14, 14),
    },
}


def batch_norm_act_cases(device, dtype, batch):
    """relu(BN(x)) and relu(BN(x) + residual), both layouts. Passes: what the kernel reads and writes where a
    second look at its input is free (on chip): 2 forward, 3 backward; a residual adds 1 and 2."""

    def eager(x, weight, bias, residual=None):
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return F.relu(y if residual is None else y + residual)

    def fused(x, weight, bias, residual=None):
        return ops.batch_norm_act(x, weight, bias, residual)[0]

    for name, shape in SHAPES[device].items():
        n, c, *size = shape = (batch or shape[0], *shape[1:])
        for layout, memory_format in LAYOUTS.items():
            for with_residual in (False, True):
                x, residual, grad = (
                    torch.randn(shape, device=device).to(dtype, memory_format=memory_format) for _ in "123"
                )
                affine = [torch.rand(c, device=device) for _ in "12"]
                inputs = [t.requires_grad_() for t in [x, *affine, *([residual] if with_residual else [])]]
                yield Case(
                    f"{name}, batch {n}, {layout}{', residual' if with_residual else ''}",
                    _providers(fused, eager, inputs),
                    inputs,
                    [grad],
                    (3, 5) if with_residual else (2, 3),
                    x.nbytes,
                )


STEMS = {
    "cpu": {"ResNet stem at 224": (8, 64, 112, 112)},
    "cuda": {"ResNet stem at 224": (256, 64, 112, 112)},  # ResNet-34's and ResNet-101's; ResNet-32 has no pool
}


def max_pool_cases(device, dtype, batch):
    """The stem behind its convolution: max_pool2d(relu(BN(x)), 3, 2, 1). Passes: x read once and a quarter written
    forward, with a byte per output; x, the quarter and the bytes read and dx written backward."""

    def eager(x, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, training=True)), 3, 2, 1)

    def fused(x, weight, bias):
        return ops.batch_norm_act_max_pool(x, weight, bias, 3, 2, 1)[0]

    for name, shape in STEMS[device].items():
        n, c, *size = shape = (batch or shape[0], *shape[1:])
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
            inputs = [t.requires_grad_() for t in (x, *(torch.rand(c, device=device) for _ in "12"))]
            index = 1 / 4 / x.itemsize
            yield Case(
                f"{name}, batch {n}, {layout}",
                _providers(fused, eager, inputs),
                inputs,
                [torch.randn_like(eager(*inputs).detach())],
                (1.25 + index, 2.25 + index),
                x.nbytes,
            )


# The feature map in front of the BatchNorm, the convolution's channels out, its kernel.
CONVOLUTIONS = {
    "cpu": {
        "ResNet-32 stage 1, 3x3": ((128, 16, 32, 32), 16, 3),
        "ResNet-32 stage 2, 3x3": ((128, 32, 16, 16), 32, 3),
        "ResNet-32 stage 3, 3x3": ((128, 64, 8, 8), 64, 3),
    },
    "cuda": {
        "ResNet-32 stage 1, 3x3": ((1024, 16, 32, 32), 16, 3),
        "ResNet-32 stage 2, 3x3": ((1024, 32, 16, 16), 32, 3),
        "ResNet-32 stage 3, 3x3": ((1024, 64, 8, 8), 64, 3),
        # ResNet-101's 3x3 convolutions have these shapes too.
        "ResNet-34 stage 1, 3x3": ((256, 64, 56, 56), 64, 3),
        "ResNet-34 stage 2, 3x3": ((256, 128, 28, 28), 128, 3),
        "ResNet-34 stage 3, 3x3": ((256, 256, 14, 14), 256, 3),
        "ResNet-34 stage 4, 3x3": ((256, 512, 7, 7), 512, 3),
        "ResNet-101 stage 1, 1x1": ((256, 64, 56, 56), 256, 1),
        "ResNet-101 stage 3, 1x1": ((256, 256, 14, 14), 1024, 1),
    },
}


def conv_batch_norm_act_cases(device, dtype, batch):
    """A block's inner convolution, conv2d(relu(BN(x))). Passes: x read and y written forward; x and y's gradient read
    and dx written backward. The rest is arithmetic, which these figures do not count."""

    def eager(x, weight, bias, filters):
        y = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
        return F.conv2d(y, filters, padding=filters.shape[2] // 2)

    def fused(x, weight, bias, filters):
        return ops.conv_batch_norm_act(x, weight, bias, filters, padding=filters.shape[2] // 2)[0]

    for name, (shape, out, kernel) in CONVOLUTIONS[device].items():
        n, c, *size = shape = (batch or shape[0], *shape[1:])
        for layout, memory_format in LAYOUTS.items():
            maps = (n, c, *size), (out, c, kernel, kernel), (n, out, *size)
            x, filters, grad = (torch.randn(s, device=device).to(dtype, memory_format=memory_format) for s in maps)
            filters /= (c * kernel**2) ** 0.5
            inputs = [t.requires_grad_() for t in (x, *(torch.rand(c, device=device) for _ in "12"), filters)]
            yield Case(
                f"{name}, batch {n}, {layout}",
                _providers(fused, eager, inputs),
                inputs,
                [grad],
                (1 + out / c, 2 + out / c),
                x.nbytes,
            )


HEADS = {
    "cpu": {"ResNet-32, 10 classes": ((128, 64, 8, 8), 10)},
    "cuda": {
        "ResNet-32, 10 classes": ((1024, 64, 8, 8), 10),
        "ResNet-34, 10 classes": ((256, 512, 7, 7), 10),
        "ResNet-34, 1000 classes": ((256, 512, 7, 7), 1000),
        "ResNet-101, 1000 classes": ((256, 2048, 7, 7), 1000),
    },
}


def head_cases(device, dtype, batch):
    """The head behind the last block: relu(BN(x) + residual), average pool, linear, cross-entropy. Passes: x and the
    residual read forward; both read and both gradients written backward."""

    def eager(x, weight, bias, residual, linear, labels):
        y = F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)
        return F.cross_entropy(F.linear(y.mean((2, 3)).to(linear.dtype), linear), labels)

    def fused(x, weight, bias, residual, linear, labels):
        return ops.pooled_cross_entropy(x, linear, None, labels, bn=(weight, bias), residual=residual).loss

    for name, (shape, classes) in HEADS[device].items():
        n, c, *size = shape = (batch or shape[0], *shape[1:])
        for layout, memory_format in LAYOUTS.items():
            x, residual = (torch.randn(shape, device=device).to(dtype, memory_format=memory_format) for _ in "12")
            affine = [torch.rand(c, device=device) for _ in "12"]
            linear = torch.randn(classes, c, device=device) / c**0.5
            inputs = [t.requires_grad_() for t in (x, *affine, residual, linear)]
            yield Case(
                f"{name}, batch {n}, {layout}",
                _providers(fused, eager, [*inputs, torch.arange(n, device=device) % classes]),
                inputs,
                [torch.ones((), device=device)],
                (2, 4),
                x.nbytes,
            )


# A unit in the middle of a network: the model and the unit by name, images, classes.
BLOCKS = {
    "cpu": {
        "ResNet-32 layer2.1": ("resnet32", "layer2.1", (128, 3, 32, 32), 10),
        "ResNet-18 layer2.1 at 224": ("resnet18", "layer2.1", (8, 3, 224, 224), 1000),
    },
    "cuda": {
        "ResNet-32 layer2.1": ("resnet32", "layer2.1", (1024, 3, 32, 32), 10),
        "ResNet-34 layer2.1 at 224": ("resnet34", "layer2.1", (256, 3, 224, 224), 1000),
        "ResNet-101 layer3.9 at 224": ("resnet101", "layer3.9", (256, 3, 224, 224), 1000),
    },
}


def local_block_cases(device, dtype, batch):
    """One local module of AugLocal, depth 4, from its input to its freed gradients: the unit and its aux net forward,
    cross-entropy, backward, a step of SGD. Each provider trains weights of its own, from the same values. Compiled:
    from the input to the loss, and the backward of it."""
    layout = "channels_last" if device == "cuda" else "contiguous"
    precision = next(name for name, value in DTYPES.items() if value == dtype)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16")

    def fused_step(trainer, index):
        features, _, loss = trainer.backward(index, x, labels)
        trainer.optimizers[index].step()
        trainer.optimizers[index].zero_grad()
        return features, loss

    def plain_step(forward, optimizer):
        features, loss = forward(x, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return features, loss.detach()

    def plain_forward(module):
        def forward(x, labels):
            with autocast():
                features, logits = module(x)
                return features.detach(), F.cross_entropy(logits, labels)

        return forward

    for name, (model, unit, shape, classes) in BLOCKS[device].items():
        n, *_ = shape = (batch or shape[0], *shape[1:])
        trainer, index, x = _local_module(model, unit, shape, classes, device, precision)
        x = x.to(dtype, memory_format=LAYOUTS[layout])
        labels = torch.arange(n, device=device) % classes
        module = trainer.local_modules[index].to(memory_format=LAYOUTS[layout])
        run = {"auglocal_ext": functools.partial(fused_step, trainer, index)}
        for provider, compiler in {"eager": lambda forward: forward, **COMPILERS}.items():
            own, optimizer = copy.deepcopy((module, trainer.optimizers[index]))
            run[provider] = functools.partial(plain_step, compiler(plain_forward(own)), optimizer)
        yield Case(f"{name}, batch {n}, {layout}", run)


def _local_module(model, unit, shape, classes, device, precision):
    """(trainer, index of the local module of the unit, an input for it): non-negative, as behind a ReLU."""
    torch.manual_seed(0)
    model = models.create(model, classes)
    modules = auglocal_ext.plan(model, shape, depth=4).modules
    index = next(module.index for module in modules if module.units == (unit,))
    trainer = auglocal_ext.LocalTrainer(model.to(device).train(), depth=4, precision=precision)
    return trainer, index, torch.randn(modules[index - 1].output_shape, device=device).relu_()


OPS = {  # what matters most first, where time is short
    "local_block": local_block_cases,
    "head": head_cases,
    "max_pool": max_pool_cases,
    "conv_batch_norm_act": conv_batch_norm_act_cases,
    "batch_norm_act": batch_norm_act_cases,
}


def _providers(fused, eager, arguments):
    functions = {"auglocal_ext": fused, "eager": eager}
    functions |= {name: compiler(eager) for name, compiler in COMPILERS.items()}
    return {name: functools.partial(function, *arguments) for name, function in functions.items()}


def median_ms(run, device, seconds, prepare=tuple):
    """Median time of run(*prepare()), what prepare takes not counted."""
    times_ms = _times_by_events if device == "cuda" else _times_by_clock
    times_ms(run, prepare)  # the first calls compile, tune and allocate
    if device == "cuda":
        times_ms = functools.partial(times_ms, lead=_seconds_to_queue(run, prepare))
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        times += times_ms(run, prepare)
    return statistics.median(times)


def _times_by_clock(run, prepare):
    given = prepare()
    started = time.perf_counter()
    run(*given)
    return [1e3 * (time.perf_counter() - started)]


def _times_by_events(run, prepare, lead=0.0):
    """Of ten calls, the cache flushed before each. lead: seconds for which the device is kept busy before each, longer
    than the host takes to queue it, so that the host runs ahead and its time is not measured."""
    flush = _larger_than_the_cache()
    calls = [[torch.cuda.Event(enable_timing=True) for _ in "12"] for _ in range(10)]
    for before, after in calls:
        torch.compiler.cudagraph_mark_step_begin()
        given = prepare()
        keep_gpu_busy(lead)
        flush.zero_()
        before.record()
        run(*given)
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in calls]


def _seconds_to_queue(run, prepare):
    """What the host takes to queue a call behind what prepare makes, generously; of a call that was made before."""
    torch.compiler.cudagraph_mark_step_begin()
    given = prepare()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run(*given)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1.5 * seconds


@functools.cache
def _larger_than_the_cache():
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def measure(case, provider, device, seconds):
    run = case.run[provider]
    if case.grads is None:
        both_ms, peak = median_ms(run, device, seconds), peak_bytes(run, provider, device)
        return Row(case.name, provider, None, None, both_ms, None, None, peak)

    def backward(output):
        return torch.autograd.grad(output, case.inputs, case.grads)

    def both():
        return backward(run())

    both_ms = median_ms(both, device, seconds)
    forward_ms = median_ms(run, device, seconds)
    backward_ms = median_ms(backward, device, seconds, prepare=lambda: (run(),))
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
        peak_bytes=peak_bytes(both, provider, device),
    )


def peak_bytes(run, provider, device):
    """Of what torch's allocator gave out, scratch within an operator included, as far as it comes from there."""
    if device == "cuda":
        if provider == "compile max-autotune":
            return None  # a CUDA graph allocates nothing when it runs
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Not LiveBytes: under a dispatch mode torch.compile runs eagerly.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Heading, width and decimals of each column of figures.
COLUMNS = {
    "forward_ms": ("fwd ms", "8.3f"),
    "backward_ms": ("bwd ms", "8.3f"),
    "both_ms": ("both ms", "8.3f"),
    "gb_per_s": ("GB/s", "7.1f"),
    "share_of_copy": ("of copy", "8.0%"),
    "peak_mb": ("peak MB", "8.1f"),
    "speed_up": ("vs eager", "9.2f"),
}


def table(rows):
    """One line per case and provider; speed-up: time of eager torch over this provider's."""
    lines = [f"{'case':56} {'provider':22}"]
    lines[0] += "".join(f" {heading:>{form.split('.')[0]}}" for heading, form in COLUMNS.values())
    eager = {row.case: row.both_ms for row in rows if row.provider == "eager"}
    for row in rows:
        figures = asdict(row)
        figures["peak_mb"] = None if row.peak_bytes is None else row.peak_bytes / 1e6
        figures["speed_up"] = eager[row.case] / row.both_ms if row.case in eager else None
        line = f"{row.case:56} {row.provider:22}"
        for column, (_, form) in COLUMNS.items():
            line += f" {'':{form.split('.')[0]}}" if figures[column] is None else f" {figures[column]:{form}}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def run_op(op, options, about):
    """Measures every case of one op; the file is written anew after each, so that a run cut short leaves its part."""
    rows = []
    for case in OPS[op](options.device, DTYPES[options.dtype], options.batch):
        if options.cases and options.cases not in case.name:
            continue
        rows += [measure(case, provider, options.device, options.seconds) for provider in options.providers or case.run]
        torch.compiler.reset()  # else torch.compile keeps the graphs of 8 cases, and runs the next ones eagerly
        if options.json:
            write_json(json_file(options, op), {**about, "rows": [asdict(row) for row in rows]})
    return rows


def json_file(options, op):
    return Path(str(options.json).replace("{op}", op))


def keep_freed_memory():
    """Makes glibc keep what is freed. Else each case's large buffers come fresh from the system or not by what was
    allocated before it, and page faults, several times a kernel's time, are measured instead of it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest


def parse(arguments=None):
    """The options of `bench`."""
    parser = Parser("bench_kernels", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=[*OPS, "all"], default="batch_norm_act")
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    names = ["auglocal_ext", "eager", *COMPILERS]
    parser.add_argument("--providers", nargs="+", choices=names, help="only these (default: all)")
    parser.add_argument("--cases", help="only those with this in their name")
    parser.add_argument("--batch", type=whole(1), help="instead of the batch that a case is named after")
    parser.add_argument("--seconds", type=number(0), default=0.5, help="measuring time per figure")
    parser.add_argument("--json", type=Path, help="also write the figures here; {op} in it is replaced by the op")
    options = parser.parse_args(arguments)
    if options.op == "all" and options.json and "{op}" not in str(options.json):
        parser.error("--json must have {op} in it where all ops are run, given " + str(options.json))
    return options


def bench(options):
    """Measures and prints; returns the exit status."""
    usable_device(options.device)
    chosen = OPS if options.op == "all" else [options.op]
    for op in chosen if options.json else ():
        check_writable(json_file(options, op), "--json")
    if options.device == "cpu":
        keep_freed_memory()
        # Else torch.compile's workers start up on the cores that are being timed.
        torch._inductor.config.compile_threads = 1
    for op in chosen:
        about = {"op": op, "dtype": options.dtype, **machine(options.device)}
        print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
        print(table(run_op(op, options, about)), flush=True)
    return 0


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("bench_kernels", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
