"""Which cheap auxiliary nets are worth having: short trainings of one protocol, and a picture of what came out.

    python python/screening.py --data imagefolder:ROOT [FILE] [--minutes M]   runs what is missing, in the queue's order
    python python/screening.py [FILE] --picture FRONT.png                     accuracy against arithmetic
    python python/screening.py [FILE]                                         the table, Markdown

ROOT has real CIFAR-10 images, 20,000 to train on and 5,000 to test. FILE: benchmarks/results/auxiliary_cifar20k.jsonl.
Every row of the queue is trained alike: batches of 128, learning rate 0.1 with Nesterov momentum, cosine, bf16, 8
epochs. What was stopped goes on within an epoch: start it again whenever a machine is idle, at low priority (nice -n
19, OMP_NUM_THREADS=1).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import queued
from paper_tables import RESULTS, Run

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


def table(rows):
    header = ["network", "nets", "K", "MACs / BP", "peak of a step", "accuracy, %", "seeds"]
    return [header, *([row.network, row.what, *queued.columns(row)] for row in rows)]


def main(arguments=None):
    """Runs the program; returns the exit status."""
    return queued.main("screening", __doc__, FILE, runs, table, arguments)


if __name__ == "__main__":
    sys.exit(main())
