"""What several processes gain: layer parallel local learning beside one process, and beside a GPipe of backpropagation.

    python python/bench_stages.py [--ranks 2] [--modules 12] [--micro-batches 8] [--json FILE]

ResNet-32 on random images of CIFAR's size, one CPU thread a process: images per second of local learning by one
process, and by several, layer parallel (decoupled and synchronous) and data parallel; of plain backpropagation by one
process on this engine and in eager PyTorch; and of a real GPipe of it, torch.distributed.pipelining's, on as many
processes, whose stages are balanced alike. In turn, all of it several times; medians. *predicted*: by the simulator,
from modules and links that the same processes measure before and behind, as a shared machine's speed drifts.
"""

import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import auglocal_ext
from auglocal_ext.backbone.families import as_backbone
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, whole
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.distributed.group import on_its_own
from auglocal_ext.models import resnet32
from auglocal_ext.stages.balance import balanced, sums_of
from auglocal_ext.stages.calibration import calibrated, measured_costs
from auglocal_ext.stages.simulate import predicted
from auglocal_ext.stages.trainer import StageTrainer

sys.path.insert(0, str(Path(__file__).parent))
from records import machine
from spawned import Failed, by_ranks

WARM_UP = 2  # steps that are not counted


def batch_of(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images.to(memory_format=torch.channels_last), torch.arange(size) % 10


def cut(modules):
    return {"modules": modules, "auxiliary": "light"}


# Each returns images per second, and what the simulator predicts from what the same processes measure, or None.

# ---- one process -----------------------------------------------------------------------------------------------------


def local_by_one(settings):
    batch = batch_of(settings.batch_size)
    trainer = auglocal_ext.LocalTrainer(resnet32(), **cut(settings.modules))
    trainer.plan_for(*batch)
    return _between(
        lambda: (measured_costs(trainer, *batch),),
        lambda costs: predicted(costs, 1),
        lambda: _steps(lambda: trainer.step(*batch), settings),
    )


def bp_by_one(settings):
    trainer = auglocal_ext.LocalTrainer(resnet32(), rule="bp")
    batch = batch_of(settings.batch_size)
    return _steps(lambda: trainer.step(*batch), settings), None


def eager_by_one(settings):
    model = resnet32().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    images, labels = batch_of(settings.batch_size)

    def step():
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _steps(step, settings), None


def _between(measure, predict, run):
    """(what `run` returns, images per second as they are predicted from what is measured before and behind it)"""
    before = measure()
    rate = run()
    foretold = [predict(*measured).images_per_second for measured in (before, measure())]
    return rate, statistics.harmonic_mean(foretold)


def _steps(step, settings):
    for _ in range(WARM_UP):
        step()
    began = time.perf_counter()
    for _ in range(settings.steps):
        step()
    return settings.steps * settings.batch_size / (time.perf_counter() - began)


# ---- several ---------------------------------------------------------------------------------------------------------


def decoupled(settings):
    return _by_stages(settings, "decoupled")


def synchronous(settings):
    return _by_stages(settings, "synchronous")


def _by_stages(settings, schedule):
    """Images per second between the first and the last step that the last rank ends."""
    batch = batch_of(settings.batch_size)
    measure = _calibration(settings, settings.batch_size)
    trainer = StageTrainer(resnet32(), *batch, schedule=schedule, **cut(settings.modules))

    def predict(costs, link):
        return predicted(costs, dist.get_world_size(), schedule, link=link, spans=trainer.spans)

    def run():
        trainer.epoch([batch] * WARM_UP)
        return trainer.epoch([batch] * settings.steps).images_per_second

    return _between(measure, predict, run)


def data_parallel(settings):
    """Each process has its share of the batch. A share takes more than its share of the time, so it is measured."""
    ranks = dist.get_world_size()
    share = settings.batch_size // ranks
    measure = _calibration(settings, share)
    trainer, batch = auglocal_ext.LocalTrainer(resnet32(), **cut(settings.modules)), batch_of(share)

    def predict(costs, link):
        costs = replace(costs.scaled(ranks), images=settings.batch_size)
        return predicted(costs, ranks, "local data parallel", link=link)

    return _between(measure, predict, lambda: _steps(lambda: trainer.step(*batch), settings))


def _calibration(settings, size):
    """A function that measures what a simulation of batches of that size needs, of the processes that are there."""
    with on_its_own():
        trainer = auglocal_ext.LocalTrainer(resnet32(), **cut(settings.modules))
        trainer.plan_for(*batch_of(size))
    return lambda: calibrated(trainer, *batch_of(size))


class ContiguousGradient(torch.autograd.Function):
    """x itself; its gradient is contiguous, in whatever layout it is computed."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return gradient.contiguous()


class Part(nn.Module):
    """Units of a network that follow on one another, the last with the classifier."""

    def __init__(self, backbone, units):
        super().__init__()
        parts = [backbone.units[index].module for index in units]
        last = units.stop == len(backbone.units)
        self.parts = nn.Sequential(*parts, *([backbone.classifier] if last else []))

    def forward(self, x):
        # torch.distributed.pipelining sends nothing else than what is contiguous, in both directions.
        return self.parts(ContiguousGradient.apply(x)).contiguous()


def gpipe(settings):
    """Backpropagation by ScheduleGPipe; BatchNorm sees micro-batches, as GPipe has it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = resnet32()
    backbone, told = as_backbone(model), [None]
    if rank == 0:
        told = [_seconds_of_units(backbone, settings.batch_size // settings.micro_batches)]
        model.zero_grad(set_to_none=True)
    dist.broadcast_object_list(told)
    units = balanced(len(told[0]), ranks, sums_of(told[0]))[rank]
    part = Part(backbone, units).to(memory_format=torch.channels_last)
    images, labels = batch_of(settings.batch_size)
    stage = PipelineStage(part, rank, ranks, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, settings.micro_batches, loss_fn=F.cross_entropy)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        given = (images,) if rank == 0 else ()
        schedule.step(*given, **({"target": labels, "losses": []} if rank == ranks - 1 else {}))
        optimizer.step()

    return _steps(step, settings), None


def _seconds_of_units(backbone, size):
    """Of forward and backward of each unit, the last with the classifier, in eager PyTorch."""
    x, seconds = batch_of(size)[0], []
    for index in range(len(backbone.units)):
        part = Part(backbone, range(index, index + 1))
        took = []
        for _ in range(4):
            given = x.detach().requires_grad_()
            began = time.perf_counter()
            out = part(given)
            out.sum().backward()
            took.append(time.perf_counter() - began)
        seconds.append(statistics.median(took[1:]))
        x = out.detach()
    return seconds


# ---- all of it -------------------------------------------------------------------------------------------------------

ALONE = {
    "local learning, one process": local_by_one,
    "BP on this engine, one process": bp_by_one,
    "eager BP, one process": eager_by_one,
}
TOGETHER = {
    "local learning, decoupled": decoupled,
    "local learning, synchronous": synchronous,
    "local learning, data parallel": data_parallel,
    "GPipe of BP": gpipe,
}


def by_processes(work, ranks, settings):
    """What `work` finds on the last of so many new processes; RuntimeError where one of them fails."""
    found, _ = by_ranks(work, ranks, settings)
    for rank, one in enumerate(found):
        if one is None or isinstance(one, Failed):
            raise RuntimeError(f"{work.__name__}: rank {rank} of {ranks} failed: {one or 'it was killed'}")
    return found[-1]


def bench(settings):
    """Measures and prints; returns the exit status."""
    if settings.json:
        check_writable(settings.json, "--json")
    torch.set_num_threads(1)
    rounds = {name: [] for name in (*ALONE, *TOGETHER)}
    for _ in range(settings.rounds):
        for name, work in {**ALONE, **TOGETHER}.items():
            rounds[name].append(by_processes(work, settings.ranks if name in TOGETHER else 1, settings))
    rows = {}
    for name, found in rounds.items():
        rates, foretold = zip(*found, strict=True)
        rows[name] = {"processes": settings.ranks if name in TOGETHER else 1, "rounds": rates}
        rows[name] |= {"images_per_second": statistics.median(rates)}
        if None not in foretold:
            rows[name] |= {"predicted_rounds": foretold, "predicted": statistics.median(foretold)}
    asked = {name: getattr(settings, name) for name in ("ranks", "modules", "batch_size", "micro_batches", "steps")}
    about = {**asked, **machine("cpu")}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    base = rows["local learning, one process"]["images_per_second"]
    for name, row in rows.items():
        rate, line = row["images_per_second"], f"{name:<30} {row['processes']} x 1 thread"
        line += f"  {rate:7.1f} images/s  {rate / base:4.2f} x"
        if "predicted" in row:
            line += f"  predicted {row['predicted']:7.1f} ({row['predicted'] / rate - 1:+.0%})"
        print(line)
    if settings.json:
        write_json(settings.json, {**about, "rows": rows})
    return 0


def parse(arguments=None):
    """The options of `bench`."""
    parser = Parser("bench_stages", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=whole(2), default=2, help="processes (default: %(default)s)")
    add("--modules", type=whole(2), default=12, help="local modules, with light nets (default: %(default)s)")
    add("--batch-size", type=whole(2), default=128, help="(default: %(default)s)")
    add("--micro-batches", type=whole(1), default=8, help="of GPipe (default: %(default)s)")
    add("--steps", type=whole(1), default=12, help="in a measurement (default: %(default)s)")
    add("--rounds", type=whole(1), default=3, help="measurements of each, in turn (default: %(default)s)")
    add("--json", type=Path, help="also write the figures here")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Runs the program; returns the exit status."""
    settings = parse(arguments)
    return errors.run("bench_stages", lambda: bench(settings))


if __name__ == "__main__":
    sys.exit(main())
