"""What a local module costs a rank: measured seconds, arithmetic or bytes."""

import statistics
import time

import torch

from ..distributed.group import on_its_own

__all__ = ["COSTS", "costs_of", "measured_seconds"]

COSTS = ("time", "arithmetic", "memory")
ROUNDS = 3


def costs_of(trainer, images, labels, what):
    """Of each local module of a LocalTrainer whose plan is made: seconds, multiply-accumulates or bytes."""
    if what == "time":
        return measured_seconds(trainer, images, labels)
    modules = trainer.plan.modules
    if what == "arithmetic":
        return [module.macs for module in modules]
    return [module.state_bytes + module.optimizer_bytes + module.kept_bytes for module in modules]


@on_its_own()
@torch.inference_mode(False)
def measured_seconds(trainer, images, labels, rounds=ROUNDS):
    """Seconds of forward and backward of each local module, medians over rounds behind one that warms up. Weights,
    statistics, gradients and random number generators are as before; the optimizers' steps are not in it."""
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
    return [statistics.median(seconds[1:]) for seconds in took]


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
