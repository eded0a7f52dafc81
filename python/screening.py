"""Which cheap auxiliary nets are worth having: short trainings of one protocol, and a picture of what came out.

    python python/screening.py --data imagefolder:ROOT [FILE] [--minutes M]   runs what is missing, in the queue's order
    python python/screening.py [FILE] --picture FRONT.png                     accuracy against arithmetic
    python python/screening.py [FILE]                                         the table, Markdown

ROOT has real CIFAR-10 images, 20,000 to train on and 5,000 to test. FILE: benchmarks/results/auxiliary_cifar20k.jsonl.
Every row of the queue is trained alike: batches of 128, learning rate 0.1 with Nesterov momentum, cosine, bf16, 8
epochs. What was stopped goes on within an epoch: start it again whenever a machine is idle, at low priority (nice -n
19, OMP_NUM_THREADS=1).
"""

import statistics
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import records
from paper_tables import METHODS, RESULTS, Run, Runner, markdown

from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, device, number
from auglocal_ext.common.files import check_writable
from auglocal_ext.common.memory import format_bytes
from auglocal_ext.report import accuracy_picture, check_picture

FILE = RESULTS / "auxiliary_cifar20k.jsonl"

BP = ("bp", None, None, None)  # rule, depth, modules, auxiliary
# The most telling first.
FIRST = [
    BP,
    ("auglocal", 4, 4, "light"),
    ("auglocal", 4, 2, "light"),
    ("auglocal", 4, 4, "pooled width=0.5 separable"),
    ("auglocal", 4, 4, None),
    ("auglocal", 2, 4, "light"),
    ("auglocal", 3, 4, "light"),
    ("auglocal", 4, 4, "pooled separable"),
    ("auglocal", 4, 2, None),
    ("dgl", None, 4, None),
]
FINALISTS = [BP, ("auglocal", 4, 4, None), ("auglocal", 4, 4, "light"), ("auglocal", 4, 2, "light")]
FINALISTS += [("auglocal", 4, 4, "pooled separable")]
OTHERS = [
    ("auglocal", 2, 2, "light"),
    ("auglocal", 4, 4, "pooled width=0.5 readout=shared"),
    ("auglocal", 3, 2, "light"),
    ("auglocal", 4, 2, "pooled separable"),
    ("auglocal", 4, 4, "pooled"),
    ("auglocal", 4, 2, "pooled width=0.5 separable"),
    ("auglocal", 4, 4, "pooled width=0.25"),
    ("auglocal", 4, 4, "width=0.5"),
    ("auglocal", 4, 4, "pooled width=0.5 share=0.5"),
]
PARTS = [("resnet20", 0, FIRST), ("resnet20", 1, FINALISTS), ("resnet32", 0, FINALISTS), ("resnet20", 2, FINALISTS)]
PARTS += [("resnet20", 0, OTHERS), ("resnet32", 1, FINALISTS), ("resnet32", 2, FINALISTS)]
QUEUE = [(network, seed, cut) for network, seed, cuts in PARTS for cut in cuts]


def runs(data):
    return [
        Run("cifar10", data, network, rule, depth, modules, 8, 128, "bf16", seed, auxiliary)
        for network, seed, (rule, depth, modules, auxiliary) in QUEUE
    ]


def results(found):
    """[(network, what, modules, [records of its seeds])], in the queue's order."""
    rows = {}
    for made in found:
        settings = made["settings"]
        what = METHODS[settings["rule"]] + (f" d={settings['depth']}" if settings["depth"] else "")
        if settings["rule"] == "auglocal":
            what += f", {settings.get('auxiliary') or 'paper'}"
        key = settings["model"], what, made["local_modules"]
        rows.setdefault(key, {})[settings["seed"]] = made
    return [(*key, list(seeds.values())) for key, seeds in rows.items()]


def table(rows):
    header = ["network", "nets", "K", "MACs / BP", "peak of a step", "accuracy, %", "seeds"]
    return [header, *([*row[:2], str(row[2]), *_figures(row[3])] for row in rows)]


def _figures(seeds):
    percent = [100 * accuracy for accuracy in accuracies(seeds)]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(seeds) > 1 else ""
    size = format_bytes(max(made["peak_bytes"] for made in seeds))
    return [f"{seeds[-1]['macs_per_bp']:.2f}", size, f"{statistics.mean(percent):.1f}{spread}", str(len(seeds))]


def draw(rows, path):
    """The picture of the network that has the most rows."""
    networks = [network for network, *_ in rows]
    network = max(networks, key=networks.count)
    rows = [row for row in rows if row[0] == network]
    runs = [
        (_group(what, count), _label(what), seeds[-1]["macs_per_bp"], seeds[-1]["peak_bytes"], accuracies(seeds))
        for _, what, count, seeds in sorted(rows, key=lambda row: row[2])
    ]
    made = rows[0][3][0]["settings"]
    title = f"{network}, {made['train_images']:,} images of CIFAR-10, {made['epochs']} epochs, {made['precision']}"
    accuracy_picture(path, title, runs, baseline=METHODS["bp"])


def _group(what, count):
    return what if what == METHODS["bp"] else f"{count} local modules"


def _label(what):
    return what.removeprefix("AugLocal ")


def accuracies(seeds):
    return [made["accuracy"]["last"] for made in seeds]


def parse(arguments=None):
    parser = Parser("screening", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", type=Path, default=FILE, metavar="FILE")
    add("--data", metavar="SOURCE", help="run what is missing on these images")
    add("--minutes", type=number(above=0), default=600, help="for all runs together (default: %(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw what is there")
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    return parser.parse_args(arguments)


def screen(options):
    """Runs what is missing, if so told, prints the table and draws the picture; returns the exit status."""
    if options.picture:
        check_picture(options.picture, "--picture")
    failed = 0
    if options.data:
        check_writable(options.file, "FILE")
        runner = Runner(options.device, options.file, [options.file], options.minutes)
        failed = runner.run_missing(runs(options.data))
    rows = results(records.read(options.file))
    if not rows:
        raise ValueError(f"no records in {options.file}: make some with --data")
    print(markdown(table(rows)))
    if options.picture:
        draw(rows, options.picture)
    return int(failed > 0)


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("screening", lambda: screen(options), lost="; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
