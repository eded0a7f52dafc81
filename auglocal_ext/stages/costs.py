"""What a local module costs a rank: measured seconds, arithmetic or bytes."""

import statistics
import time

import torch
from torch import nn

from ..common.stopwatch import median_seconds
from ..distributed.group import on_its_own
from ..optim import make_optimizer
from .balance import sums_of

__all__ = ["COSTS", "cost_of", "group_bytes", "measured_seconds", "optimizer_seconds"]

COSTS = ("time", "arithmetic", "memory")
ROUNDS = 3


def cost_of(trainer, images, labels, what):
    """(range of local modules) -> what they cost a rank in a step, of a LocalTrainer whose plan is made: seconds,
    multiply-accumulates or bytes."""
    if what == "memory":
        return lambda group: group_bytes(trainer.plan, group)
    if what == "arithmetic":
        return sums_of([module.macs for module in trainer.plan.modules])
    backward = measured_seconds(trainer, images, labels)
    factory, every = trainer.plan.origin.optimizer, trainer.stepping.accumulate
    steps = [optimizer_seconds(factory, module, trainer.device) / every for module in trainer.local_modules]
    return sums_of([both + step for both, step in zip(backward, steps, strict=True)])


def group_bytes(plan, group):
    """The highest memory of a step of a rank that has these local modules: what stays of all of them, and the
    activations and gradients of the one that needs most. Of several pipelines it is counted as if the modules around
    these were here: their gradients on the way, at most one module's."""
    modules = [plan.modules[index] for index in group]
    state = sum(module.state_bytes + module.optimizer_bytes for module in modules)
    if plan.origin.stepping.accumulates:
        state += sum(module.gradient_bytes for module in modules)
    return state + max(module.peak_bytes for module in modules) - plan.state_bytes


def optimizer_seconds(factory, module, device):
    """Of a step of copies of what trains in a module."""
    copies = [nn.Parameter(p.detach().clone()) for p in module.parameters() if p.requires_grad]
    if not copies:
        return 0.0
    optimizer = make_optimizer(factory, [(str(index), copy) for index, copy in enumerate(copies)])
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    return median_seconds(device, optimizer.step, ROUNDS)  # after a step that makes its state


@on_its_own()
@torch.inference_mode(False)
def measured_seconds(trainer, images, labels, rounds=ROUNDS, middle=statistics.median):
    """Seconds of forward and backward of each local module, the middle of rounds behind one that warms up. Weights,
    statistics, gradients and random number generators are as before; the optimizers' steps are not in it. middle: of
    the rounds' seconds."""
    buffers = [(buffer, buffer.clone()) for module in trainer.local_modules for buffer in module.buffers()]
    took = [[] for _ in trainer.local_modules]
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
        for _ in range(rounds + 1):
            features = images
            for index, module in enumerate(trainer.local_modules):
                began = _now(trainer.device)
                features, _, _ = trainer.backward(index, features, labels, images)
                took[index].append(_now(trainer.device) - began)
                for parameter in module.parameters():
                    parameter.grad = None
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return [middle(seconds[1:]) for seconds in took]


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
