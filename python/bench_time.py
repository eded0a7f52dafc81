"""Predicted times of steps beside measured ones, each relative to backpropagation's, over cuts of three networks.

    auglocal calibrate
    python python/bench_time.py [--device cpu|cuda] [--precision fp32|bf16] [--networks NAME ...] [--rounds 5]
    [--json FILE]

All cuts of a network are stepped in turn, one step each a round, so that what disturbs the machine disturbs them alike;
a figure is the median of the rounds. With one thread (OMP_NUM_THREADS=1) times are of the processor, see `Stopwatch`.
"""

import statistics
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tqdm import tqdm

import auglocal_ext
from auglocal_ext.backbone.families import as_backbone
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, default_device, device, whole
from auglocal_ext.common.checks import PRECISIONS
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.common.stopwatch import Stopwatch
from auglocal_ext.optim import named_optimizer
from auglocal_ext.planning.calibration import load
from auglocal_ext.planning.planner import Planner
from auglocal_ext.rules.by_name import as_rule
from auglocal_ext.rules.cutting import cut

sys.path.insert(0, str(Path(__file__).parent))
from records import machine

# Network -> shape of a batch, classes; on a GPU ON_A_GPU times as many images.
NETWORKS = {
    "resnet32": ((128, 3, 32, 32), 10),
    "resnet18": ((8, 3, 224, 224), 1000),
    "vgg11_bn": ((4, 3, 224, 224), 1000),
}
ON_A_GPU = 16
LEAD = 0.1  # seconds: more than the host takes to queue a step
# (rule, depth, modules; None: one per unit)
CUTS = (
    ("bp", 4, None),
    ("checkpoint", 4, None),
    ("auglocal", 4, 2),
    ("auglocal", 4, 3),
    ("auglocal", 4, 4),
    ("auglocal", 4, None),
    ("auglocal", 2, None),
    ("auglocal", 2, 2),
    ("auglocal", 3, 4),
    ("auglocal", 6, 3),
)


def batch_of(network, where):
    """(shape, classes)"""
    (images, *size), classes = NETWORKS[network]
    return (images * (ON_A_GPU if where.type == "cuda" else 1), *size), classes


def trainers(network, where, precision, clock):
    """(name of the cut, LocalTrainer, its plan) of each cut. All train one model, and change nothing in it."""
    shape, classes = batch_of(network, where)
    torch.manual_seed(0)
    model = auglocal_ext.models.create(network, classes).to(where)
    backbone, optimizer = as_backbone(model), named_optimizer("sgd", 0.0)
    for name, depth, modules in CUTS:
        rule = as_rule(name, depth, None)
        planner = Planner(model, precision, optimizer, rule.recompute, backbone=backbone, clock=clock)
        planned = planner.plan(cut(backbone, rule, modules), shape, rule)
        count = len(planned.modules)
        what = f"{name}, d = {depth}, K = {count}" if rule.depth else name
        yield what, auglocal_ext.LocalTrainer(model, plan=planned), planned


def measure(network, where, precision, clock, rounds):
    """A row for each cut: times in milliseconds, and relative to backpropagation's, the first."""
    shape, classes = batch_of(network, where)
    images = torch.randn(shape, device=where).to(memory_format=torch.channels_last)
    labels = torch.arange(len(images), device=where) % classes
    cuts, times = list(trainers(network, where, precision, clock)), {}
    for turn in tqdm(range(rounds + 1), desc=network, unit="round", leave=False, disable=None):
        for what, trainer, _ in cuts:
            watch = Stopwatch(where, LEAD)
            trainer.step(images, labels)
            watch.lap()
            if turn:  # the first warms up
                times.setdefault(what, []).extend(watch.laps())
    measured = {what: statistics.median(laps) / 1e6 for what, laps in times.items()}
    predicted = {what: planned.milliseconds for what, _, planned in cuts}
    macs = {what: planned.macs / planned.bp_macs for what, _, planned in cuts}
    bp = cuts[0][0]
    for what in measured:
        row = {"network": network, "cut": what, "measured_ms": measured[what], "predicted_ms": predicted[what]}
        row |= {"measured": measured[what] / measured[bp], "predicted": predicted[what] / predicted[bp]}
        yield row | {"error": row["predicted"] / row["measured"] - 1, "macs": macs[what]}


def line(row):
    """A row of the table."""
    figures = (
        f"{row['measured_ms']:.1f}",
        f"{row['predicted_ms']:.1f}",
        f"{row['measured']:.2f}",
        f"{row['predicted']:.2f}",
        f"{row['error']:+.1%}",
        f"{row['macs']:.2f}",
    )
    return _line(row["network"], row["cut"], *figures)


def _line(network, cut, *figures):
    return f"{network:<9} {cut:<24}" + "".join(f" {figure:>12}" for figure in figures)


def parse(arguments=None):
    """The options of `bench`."""
    parser = Parser("bench_time", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", type=device, default=default_device())
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    add("--rounds", type=whole(1), default=5, help="steps of each cut that are timed (default: %(default)s)")
    add("--json", type=Path, help="also write the figures here")
    return parser.parse_args(arguments)


def bench(options):
    """Measures and prints; returns the exit status."""
    if options.json:
        check_writable(options.json, "--json")
    clock, where = load(options.device, options.precision), torch.device(options.device)
    about = {"precision": options.precision, "rounds": options.rounds, **machine(where)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(_line("network", "cut", "ms", "predicted", "ms / BP", "predicted", "error", "MACs / BP"))
    rows = []
    for network in options.networks:
        for row in measure(network, where, options.precision, clock, options.rounds):
            rows.append(row)
            print(line(row), flush=True)
        if options.json:
            write_json(options.json, {**about, "rows": rows})
    print(f"largest error of a time relative to BP's: {max(abs(row['error']) for row in rows):.1%}")
    return 0


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("bench_time", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
