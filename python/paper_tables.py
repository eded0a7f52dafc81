"""The paper's tables, its figures beside ours, from files of results; with --run also what is missing in them.

    python python/paper_tables.py [FILE ...]     Markdown; default: every benchmarks/results/*.jsonl of trainings
    python python/paper_tables.py --run [FILE] --data SOURCE --epochs E --batch-size B [--minutes M] [what to run]

One block of tables for each group of runs whose settings agree in everything but the rule, its cut and the seed, on one
device; means and sample standard deviations are over the seeds. Of two runs of one seed the later line counts.

--run trains by train_cifar.py and train_imagenet.py, and adds to FILE (default: benchmarks/results/paper.jsonl). What
is there already is not run again, and a run that the minutes cut off leaves its checkpoint in FILE.partial: the same
command goes on where it stopped, within an epoch too. Learning rates are the programs' own.

    CPU, an ImageFolder of CIFAR-10 images, every rule, d = 2, 4, 6 and K = 2, 4, 16 at d = 4:
        --run --data imagefolder:DATA --epochs 5 --batch-size 128 --depths 2 4 6 --modules 2 4 16 --minutes 120
    GPU, whole CIFAR-10, every rule and d = 2 to 6:
        --run --data cifar10:DATA --epochs 10 --batch-size 1024 --precision bf16
    then the cuts into K modules, or the other network: the same and --modules 2 3 4 8, or --networks resnet110
"""

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import recipes
import records

import auglocal_ext
from auglocal_ext.backbone import as_backbone
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, device, number, seed, whole
from auglocal_ext.common.checks import PRECISIONS
from auglocal_ext.common.files import check_writable
from auglocal_ext.common.memory import format_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# ---- the paper: AugLocal, ICLR 2024 (arXiv:2402.17318) ----------------------------------------------------------

METHODS = {
    "bp": "BP",
    "checkpoint": "GC",
    "predsim": "PredSim",
    "infopro": "InfoPro",
    "dgl": "DGL",
    "auglocal": "AugLocal",
}
DEPTHS = range(2, 7)
ROWS = [*((rule, None) for rule in ("bp", "predsim", "infopro", "dgl")), *(("auglocal", d) for d in DEPTHS)]

# Accuracy in %, (mean, standard deviation) of each of ROWS.
ACCURACY = {
    ("resnet32", "cifar10"): [(93.73, 0.04), (79.29, 0.37), (87.26, 0.16), (86.30, 0.12)]
    + [(91.12, 0.24), (92.26, 0.20), (93.08, 0.10), (93.38, 0.11), (93.47, 0.09)],
    ("resnet32", "svhn"): [(97.01, 0.03), (92.02, 0.35), (93.30, 0.73), (95.14, 0.09)]
    + [(95.86, 0.04), (96.43, 0.02), (96.79, 0.08), (96.87, 0.03), (96.85, 0.08)],
    ("resnet32", "stl10"): [(80.80, 0.17), (70.67, 0.39), (70.85, 0.14), (73.13, 1.08)]
    + [(78.58, 0.66), (79.79, 0.27), (80.65, 0.16), (80.73, 0.18), (80.95, 0.55)],
    ("resnet110", "cifar10"): [(94.61, 0.18), (74.95, 0.36), (86.95, 0.46), (85.69, 0.32)]
    + [(90.98, 0.05), (92.62, 0.22), (93.22, 0.17), (93.75, 0.20), (93.96, 0.15)],
    ("resnet110", "svhn"): [(97.10, 0.05), (89.90, 0.76), (92.26, 0.59), (95.12, 0.06)]
    + [(95.92, 0.10), (96.45, 0.08), (96.74, 0.11), (96.85, 0.05), (96.96, 0.01)],
    ("resnet110", "stl10"): [(80.41, 0.74), (68.91, 0.48), (70.61, 0.50), (72.27, 0.51)]
    + [(78.29, 0.37), (79.30, 0.26), (80.77, 0.33), (80.20, 0.56), (80.40, 0.17)],
}
# ImageNet, top-1 and top-5 in %, of one depth.
IMAGENET = {
    "vgg13": {"bp": (71.59, 90.37), "dgl": (67.32, 87.81), "auglocal": (70.92, 90.13)},
    "resnet34": {"bp": (74.28, 91.76), "auglocal": (73.95, 91.70)},
    "resnet101": {"bp": (77.34, 93.71), "auglocal": (76.70, 93.29)},
}
# GPU memory in GB, of one depth: on CIFAR-10 of batches of 1024, on ImageNet summed over the GPUs.
MEMORY = {
    ("resnet32", "cifar10"): {"bp": 3.15, "auglocal": 1.67},
    ("resnet110", "cifar10"): {"bp": 9.27, "checkpoint": 3.03, "auglocal": 1.72},
    ("resnet34", "imagenet"): {"bp": 42.95, "auglocal": 29.04},
    ("resnet101", "imagenet"): {"bp": 157.12, "auglocal": 97.65},
}

# ---- tables -----------------------------------------------------------------------------------------------------

UNUSUAL = set(recipes.MORE_SETTINGS) - {
    "budget",
    "recompute",
    "auxiliary",
    "image_size",
}  # in a record where no recipe has it so
CUT = (
    "rule",
    "depth",
    "modules",
    "auxiliary",
    "form",
    "budget",
    "recompute",
)  # the settings that differ within a group


class Group:
    """Runs of equal settings but CUT and the seed.

    settings: those that are equal, and the device.
    runs: cut, the values of CUT -> the records of its seeds.
    """

    def __init__(self, settings):
        self.settings, self._seeds = settings, {}

    def add(self, made):
        self._seeds.setdefault(cut_of(made), {})[made["settings"]["seed"]] = made

    @property
    def runs(self):
        return {
            cut: list(seeds.values()) for cut, seeds in sorted(self._seeds.items(), key=lambda item: _rank(item[0]))
        }

    def uncut(self, rule, depth=None):
        """The records of a rule as the paper has it: one module per unit, or one for BP and GC."""
        return list(self._seeds.get((rule, depth, *[None] * (len(CUT) - 2)), {}).values())

    @property
    def network(self):
        return self.settings["model"].removesuffix("_bn")

    @property
    def dataset(self):
        return self.settings["dataset"]


def cut_of(made):
    return tuple(made["settings"].get(name) or None for name in CUT)


def _rank(cut):
    rule, depth, modules, *others = cut
    order = list(METHODS)
    known = order.index(rule) if rule in order else len(order)
    return known, depth or 0, any(others), modules or 0, str(others)


def grouped(all_records):
    """The Groups of some records, in the order of their first ones."""
    groups = {}
    for made in all_records:
        settings = {name: value for name, value in made["settings"].items() if name not in (*CUT, "seed")}
        settings["device"] = made["machine"]["device"]
        key = json.dumps(settings, sort_keys=True)
        groups.setdefault(key, Group(settings)).add(made)
    return list(groups.values())


def block(group):
    """Everything about a group, as Markdown."""
    tables = [
        ("Accuracy on the test images after the last epoch, %; gap to BP in points", accuracy_table(group)),
        ("Peak memory: the paper's of its GPUs, ours of one step", memory_table(group)),
        ("All runs: seconds of training, multiply-accumulates of a step against BP's", all_runs(group)),
    ]
    about = [f"{name} {_plain(value)}" for name, value in group.settings.items() if name not in ("model", "dataset")]
    parts = [f"## {group.settings['model']} on {group.dataset}", ", ".join(about)]
    for title, rows in tables:
        if len(rows) > 1:
            parts += [f"{title}:", markdown(rows)]
    return "\n\n".join(parts) + "\n"


def _plain(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def accuracy_table(group):
    imagenet = group.dataset == "imagenet"
    paper = _paper_imagenet(group) if imagenet else _paper_small(group)
    header = ["method", "paper", "ours", "seeds", "paper's gap", "our gap"]
    rows = [header[:1] + ["paper top-1", "our top-1", "paper top-5", "our top-5"] + header[3:] if imagenet else header]
    bp, paper_bp = group.uncut("bp"), paper.get(("bp", None))
    for rule, depth in paper:
        theirs, ours = paper[rule, depth], group.uncut(rule, depth)
        cells = [_method(rule, depth)]
        for index, name in enumerate(("accuracy", "top5") if imagenet else ("accuracy",)):
            values = [100 * made[name]["last"] for made in ours if name in made]
            cells += [_mean_std(*theirs[index]) if theirs else "", _measured(values)]
        cells.append(str(len(ours) or ""))
        is_bp = rule == "bp"
        cells.append(f"{theirs[0][0] - paper_bp[0][0]:+.2f}" if theirs and paper_bp and not is_bp else "")
        cells.append(f"{100 * (_mean_last(ours) - _mean_last(bp)):+.2f}" if ours and bp and not is_bp else "")
        rows.append(cells)
    return rows


def _paper_small(group):
    """(rule, depth) -> ((mean, std),) of the paper's rows, None where it has no figure."""
    figures = ACCURACY.get((group.network, group.dataset), [None] * len(ROWS))
    return {row: figure and (figure,) for row, figure in zip(ROWS, figures, strict=True)}


def _paper_imagenet(group):
    """(rule, depth) -> top-1's and top-5's (mean, None); AugLocal's, whose depth is not known, in a row of its own."""
    figures, rows = IMAGENET.get(group.network, {}), {}
    for rule in ("bp", "predsim", "infopro", "dgl", "auglocal"):
        if rule in figures or group.uncut(rule):
            rows[rule, None] = tuple((value, None) for value in figures[rule]) if rule in figures else None
    return rows | {("auglocal", depth): None for depth in _depths(group)}


def _depths(group):
    """Those AugLocal was run with, one module per unit."""
    return sorted({depth for rule, depth, *_ in group.runs if rule == "auglocal" and group.uncut(rule, depth)})


def memory_table(group):
    rows = [["method", "paper, GB", "paper, of BP", "ours, GB", "ours, of BP"]]
    figures, bp = MEMORY.get((group.network, group.dataset), {}), group.uncut("bp")
    same_batch = group.settings["batch_size"] == 1024  # the paper's
    cuts = [(rule, None) for rule in figures] + [("auglocal", depth) for depth in _depths(group) if figures]
    for rule, depth in cuts:
        ours, theirs = group.uncut(rule, depth), None if depth else figures[rule]
        cells = [_method(rule, depth), f"{theirs:.2f}" if theirs and same_batch else ""]
        cells.append(_saved(theirs, figures["bp"]) if theirs else "")
        cells.append(f"{_peak(ours) / 1e9:.3f}" if ours else "")
        cells.append(_saved(_peak(ours), _peak(bp)) if ours and bp else "")
        rows.append(cells)
    return rows


def _saved(size, whole):
    return f"{100 * (size / whole - 1):+.1f} %" if size != whole else ""


def all_runs(group):
    header = ["method", "cut", "modules", "accuracy, %", "seeds", "MACs / BP", "seconds", "peak"]
    rows = [header]
    for cut, made in group.runs.items():
        rule, depth, modules, auxiliary, form, budget, recompute = cut
        parts = ["one per unit"] if rule not in ("bp", "checkpoint") and not modules and not budget else []
        parts += [f"K={modules}"] if modules else []
        parts += [f"nets {auxiliary}"] if auxiliary else []
        parts += [f"budget {budget}"] if budget else []
        parts += [f"form {form}"] if form else []
        parts += ["recompute"] if recompute else []
        rows.append(
            [
                _method(rule, depth),
                ", ".join(parts),
                str(made[-1]["local_modules"]),
                _measured([100 * one["accuracy"]["last"] for one in made]),
                str(len(made)),
                f"{made[-1]['macs_per_bp']:.2f}",
                f"{statistics.mean(one['seconds'] for one in made):.1f}",
                format_bytes(_peak(made)),
            ]
        )
    return rows


def _method(rule, depth):
    return METHODS.get(rule, rule) + (f" d={depth}" if depth else "")


def _mean_last(made):
    return statistics.mean(one["accuracy"]["last"] for one in made)


def _peak(made):
    return max(one["peak_bytes"] for one in made)


def _measured(values):
    if not values:
        return ""
    return _mean_std(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def _mean_std(mean, std):
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def markdown(rows):
    """Rows of cells, the first one the header, as a table that is aligned as plain text too; the first column left."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ruler = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(ruler) + " |", *lines[1:]])


# ---- running what is missing --------------------------------------------------------------------------------------

DATASETS = ("cifar10", "svhn", "stl10", "imagenet")

GRACE = 120  # seconds that a training has to start and to stop in, beside those that are left
_GOES_ON = "the same command goes on from here"

# The most useful rows first.
ORDER = [("bp", None), ("auglocal", 4), ("auglocal", 2), ("auglocal", 6), ("dgl", None), ("predsim", None)]
ORDER += [("infopro", None), ("checkpoint", None), ("auglocal", 3), ("auglocal", 5)]


@dataclass(frozen=True)
class Run:
    """One training; the names are those of its record's settings, and of the programs' options."""

    dataset: str
    data: str
    model: str
    rule: str
    depth: int | None
    modules: int | None
    epochs: int
    batch_size: int
    precision: str
    seed: int
    auxiliary: str | None = None  # None: the paper's

    def __str__(self):
        cut = f" K={self.modules}" if self.modules else ""
        cut += f", {self.auxiliary}," if self.auxiliary else ""
        return f"{self.model} {self.dataset} {_method(self.rule, self.depth)}{cut} seed {self.seed}"

    @classmethod
    def of(cls, settings):
        """That which makes a record of these settings."""
        return cls(**{field.name: settings.get(field.name) for field in fields(cls)})

    @property
    def slug(self):
        """Of all its settings but where the images are: what its checkpoint is found by."""
        values = (f"{name}-{value}" for name, value in asdict(self).items() if name != "data" and value is not None)
        return re.sub(r"[^\w.-]", "_", "-".join(values))

    def command(self, device, results, checkpoint, seconds, save=None):
        program = "train_imagenet.py" if self.dataset == "imagenet" else "train_cifar.py"
        command = [sys.executable, str(ROOT / "python" / program)]
        for name, value in asdict(self).items():
            if value is not None and not (name == "dataset" and value == "imagenet"):
                command += ["--" + name.replace("_", "-"), str(value)]
        command += ["--device", device, "--results", str(results), "--checkpoint", str(checkpoint)]
        command += ["--save", str(save)] if save else []
        return [*command, "--max-seconds", f"{max(seconds, 1):.0f}", "--quiet"]


def wanted_runs(options):
    """What the options ask for, in the order to run it: all of one seed before the next."""
    cuts = [(rule, depth, None) for rule, depth in ORDER if rule in options.rules and depth in (None, *options.depths)]
    if "auglocal" in options.rules:
        depth = 4 if 4 in options.depths else options.depths[0]
        cuts += [("auglocal", depth, count) for count in options.modules]
    return [
        Run(dataset, source, model, *cut, options.epochs, options.batch_size, options.precision, seed)
        for seed in options.seeds
        for model in options.networks
        for dataset, source in zip(options.datasets, options.data, strict=True)
        for cut in cuts
    ]


class Runner:
    """Runs trainings within the minutes; a line for each.

    models: a folder for their weights, or None.
    then: () -> how much of it failed, called before the first training, for what was stopped, and after each.
    """

    def __init__(self, device, results, files, minutes, models=None, then=lambda: 0):
        self.device, self.results, self.files, self.models, self.then = device, results, files, models, then
        self.machine = records.machine(device)["device"]
        self.until = time.perf_counter() + 60 * minutes

    def finished(self, **settings):
        """The records that have these settings and were made on this device, and whose cut is not special."""
        return [
            made
            for made in records.read(*self.files)
            if made["machine"]["device"] == self.machine
            and not any(cut_of(made)[CUT.index("form") :])
            and not UNUSUAL & made["settings"].keys()
            and all(made["settings"].get(name) == value for name, value in settings.items())
        ]

    def run_missing(self, runs):
        """Runs those without a record; returns how many failed or diverged, or what is done after them did."""
        missing = [run for run in runs if not self.finished(**asdict(run))]
        print(f"{len(runs)} runs, {len(runs) - len(missing)} of them there already", flush=True)
        failed = self.then()
        for index, run in enumerate(missing, 1):
            print(f"[{index}/{len(missing)}] {run}: ", end="", flush=True)
            outcome, output = self._run(run)
            print(outcome, output, sep="\n" if output else "", flush=True)
            failed += outcome.startswith(("FAILED", "DIVERGED"))
            if self.finished(**asdict(run)):
                failed += self.then()
        return failed

    def _run(self, run):
        """(what came of it, what to show of the program's own output)"""
        left = self.until - time.perf_counter()
        if left <= 0:
            return "left out: the time is up", ""
        checkpoint = self.results.parent / f"{self.results.name}.partial" / run.slug
        save = self.models and self.models / f"{run.slug}.pt"
        command = run.command(self.device, self.results, checkpoint, left, save)
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=left + GRACE
            )
        except subprocess.TimeoutExpired:
            return f"stopped: it did not end by itself in {GRACE} s more; {_GOES_ON}", ""
        if done.returncode == 3:
            return "DIVERGED: no record", done.stdout
        if done.returncode:
            return f"FAILED ({done.returncode})", done.stdout
        found = self.finished(**asdict(run))
        if not found and (checkpoint / "last.pt").exists():
            return f"stopped: the time is up; {_GOES_ON}", ""
        if not found:
            return f"FAILED: no record of these settings in {self.results}", done.stdout
        made = found[-1]
        shutil.rmtree(checkpoint, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are in it
            checkpoint.parent.rmdir()
        return f"{made['accuracy']['last']:.2%}, {made['seconds']:.1f} s, {format_bytes(made['peak_bytes'])}", ""


def parse(arguments=None):
    """The options, checked as far as they can be before anything is run."""
    parser = Parser("paper_tables", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="results (default: benchmarks/results/*.jsonl of trainings)"
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--run", action="store_true", help="first run what is missing")
    add("--minutes", type=number(above=0), default=10, help="for all runs together (default: %(default)s)")
    add("--networks", nargs="+", default=["resnet32"], metavar="MODEL", help="(default: resnet32)")
    add("--datasets", nargs="+", default=["cifar10"], choices=DATASETS, help="(default: cifar10)")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="--data of train_cifar.py or train_imagenet.py, one a dataset",
    )
    add("--rules", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    add("--depths", nargs="+", type=int, default=list(DEPTHS), choices=DEPTHS, help="of AugLocal (default: all)")
    modules = "cut AugLocal of depth 4 into K modules too"
    add("--modules", nargs="+", type=whole(1), default=[], metavar="K", help=modules)
    add("--seeds", nargs="+", type=seed, default=[0], help="(default: 0)")
    add("--epochs", type=whole(1, expected="a whole number of at least 1"))
    add("--batch-size", type=whole(2))
    add("--precision", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=here, help="cpu, cuda or cuda:N (default here: %(default)s)")
    options = parser.parse_args(arguments)
    if options.run:
        if options.epochs is None or options.batch_size is None:
            parser.error("--run needs --epochs and --batch-size")
        if len(options.data) != len(options.datasets):
            parser.error(f"--data must name a source for each of --datasets {' '.join(options.datasets)}")
    return options


def report(options):
    """Runs what is missing, if so told, and prints the tables; returns the exit status."""
    files, failed = options.files or list(filter(records.is_of_trainings, sorted(RESULTS.glob("*.jsonl")))), 0
    if options.run:
        for network in options.networks:
            with torch.device("meta"):
                as_backbone(auglocal_ext.models.create(network, 10))  # says what is wrong with it
        results = options.files[0] if options.files else RESULTS / "paper.jsonl"
        check_writable(results, "FILE")
        files = list(dict.fromkeys([*files, results]))
        failed = Runner(options.device, results, files, options.minutes).run_missing(wanted_runs(options))
        print()
    found = records.read(*files)
    if not found:
        where = ", ".join(map(str, files)) or RESULTS
        print(f"paper_tables: no records in {where}: make some with --run, see --help", file=sys.stderr)
        return 1
    print("\n".join(block(group) for group in grouped(found)))
    return int(failed > 0)


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("paper_tables", lambda: report(options), lost="; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
