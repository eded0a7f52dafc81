"""Measures what the engine's instructions cost on this machine: steps of small local modules, and optimizers'."""

import copy
import statistics

import torch
from torch import nn

from ..common.checks import AUTOCAST
from ..common.memory import bytes_of, tensors_of
from ..common.stopwatch import Stopwatch
from ..engine.program import build
from ..engine.timeline import timeline
from ..engine.trace import join, trace
from ..optim import OPTIMIZERS, make_optimizer, named_optimizer
from .calibration import Sample, described, optimizer_sample
from .calibration_cases import Residual, calibration_cases

__all__ = ["measure"]

REPEATS = 3  # after one that warms up
LEAD = 0.02  # seconds: more than the host takes to queue a step of any case
PARAMETERS = ((100, 1000), (16, 500_000), (2, 16_000_000))  # how many tensors of so many elements an optimizer steps


@torch.inference_mode(False)
def measure(device, precision, cases=None, parameters=PARAMETERS, progress=iter):
    """Measures modules step by step, and every optimizer by name.

    Args:
        device: a torch.device.
        precision: "fp32", "bf16" or "fp16".
        cases: list of `Case`; None: `calibration_cases`, which take about a minute on one core.
        parameters: (how many tensors, of how many elements) pairs, of at least one tensor.
        progress: wraps the list of what is measured, as tqdm does.

    Returns:
        list of Sample. Times are medians; see `Stopwatch`.
    """
    autocast = AUTOCAST[precision]
    _settle_allocator()
    work = [(_module, case, autocast) for case in (calibration_cases(device.type) if cases is None else cases)]
    work += [(_optimizer, name, pair) for name in OPTIMIZERS for pair in parameters]
    return [sample for run, *what in progress(work) for sample in run(device, *what)]


def _settle_allocator():
    """Brings the C library to keep freed memory for the next tensor, as it does in a training: once it has freed a
    piece, those that are no larger stay with the process. The largest that it minds are of 32 MiB."""
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _module(device, case, autocast):
    """The Samples of a Case's steps."""
    n, classes = case.shape[0], case.head[-1].out_features
    dtype = autocast if autocast and case.shape[1] != 3 else torch.float32
    x = torch.randn(case.shape, device=device).to(dtype, memory_format=torch.channels_last)
    labels = torch.arange(n, device=device) % classes
    without_data, samples = nn.ModuleList([case.body, case.head]), []

    def note(step, reads, made, macs):
        samples.append(described(step, reads, made, macs))
        return 0

    program, there = _program(without_data, autocast, device), tensors_of(without_data)
    timeline(program, x.to("meta"), labels.to("meta"), there, clock=note)
    program = _program(_with_data(without_data, device), autocast, device)
    runs = [_run(program, x, labels) for _ in range(1 + REPEATS)]
    return _timed(samples, runs[1:])


def _with_data(module, device):
    """A module that is on the meta device on another one, with initial values."""
    module = copy.deepcopy(module).to_empty(device=device)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


def _program(module, autocast, device):
    body, head = module
    nodes, out = trace(body, (Residual,), "body", "x")
    nodes = join(nodes, trace(head, (), "head", out)[0], None)
    return build(nodes, "x", None, autocast=autocast, device_type=device.type)


@torch.no_grad()
def _run(program, x, labels):
    """The nanoseconds of each step."""
    values = program.given(x, labels, x)
    clock = Stopwatch(x.device, LEAD)
    for step in program.steps:
        program.execute(step, values)
        clock.lap()
    return clock.laps()


def _optimizer(device, name, pair):
    """The Sample of an optimizer's step, its gradients freed with it."""
    count, elements = pair
    parameters = [nn.Parameter(torch.zeros(elements, device=device)) for _ in range(count)]
    optimizer, runs = make_optimizer(named_optimizer(name, 1e-3), enumerate(parameters)), []
    for _ in range(1 + REPEATS):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        clock = Stopwatch(device, LEAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap()
        runs.append(clock.laps())
    state = [value for values in optimizer.state.values() for value in values.values()]
    held = bytes_of(value for value in state if isinstance(value, torch.Tensor))
    return _timed([optimizer_sample(type(optimizer).__name__, parameters, held)], runs[1:])


def _timed(samples, runs):
    medians = (max(round(statistics.median(times)), 1) for times in zip(*runs, strict=True))
    return [Sample(s.group, s.costs, s.place, ns) for s, ns in zip(samples, medians, strict=True)]
