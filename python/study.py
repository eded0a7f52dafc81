"""The accuracy study: what every cut and every rule of the paper is worth, beside backpropagation of the same schedule.

    python python/study.py --data imagefolder:ROOT [FILE] [--models FOLDER] [--minutes M]   runs what is missing
    python python/study.py [FILE] --picture STUDY.png                       accuracy against arithmetic and memory
    python python/study.py [FILE]                                           the table, Markdown

ROOT has CIFAR-10, 50,000 images to train on and 10,000 to test. FILE: benchmarks/results/study_cifar50k.jsonl. Every
row is trained alike: ResNet-32, batches of 128, learning rate 0.1 with Nesterov momentum, cosine, bf16, 10 epochs. One
seed of every row comes first, and two of backpropagation, then more of the rows that matter most. What was stopped goes
on within an epoch: start it again whenever a machine is idle, at low priority (nice -n 19, OMP_NUM_THREADS=1).

With --models study_analysis.py looks at each model as soon as it is trained, two minutes of one core a row. Its line is
kept beside FILE, and so are backpropagation's models of seeds 0 and 1: FOLDER may be lost with its machine.
`python docs/results.py` then renews the results' page.

A difference from backpropagation has a 95 % interval: Student's, with one standard deviation for all rows, pooled over
those of several seeds. It is of other seeds on the same test images. Two rows are called equal only where the interval
lies within one point.

Core minutes are of a training whose epochs all take what its fastest one took, times its threads: others share the
machines' cores, and only slow an epoch down.
"""

import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import queued
from paper_tables import ACCURACY, METHODS, RESULTS, ROWS, Run

FILE = RESULTS / "study_cifar50k.jsonl"
EPOCHS, BATCH, NETWORK = 10, 128, "resnet32"

BP = ("bp", None, None, None)  # rule, depth, modules (None: as the rule's authors cut), auxiliary
PAPER = {count: ("auglocal", 4, count, None) for count in (2, 4, None)}
LIGHT = {count: ("auglocal", 4, count, "light") for count in (2, 3, 4, 8)}
DGL, PREDSIM = ("dgl", None, None, None), ("predsim", None, None, None)
FIRST = [BP, LIGHT[2], PAPER[4], LIGHT[4], PAPER[2], DGL, PAPER[None], LIGHT[3], LIGHT[8]]
FIRST += [("auglocal", 2, None, None), ("dgl", None, 4, None), PREDSIM]
FIRST += [("infopro", None, None, None), ("auglocal", 6, None, None)]
AGAIN = [BP, LIGHT[2], PAPER[4], LIGHT[4], LIGHT[3]]
QUEUE = [(0, BP), (1, BP)]  # all other models are compared with these two, see study_analysis.py
QUEUE += [(seed, cut) for seed in range(5) for cut in (AGAIN if seed else FIRST) if (seed, cut) not in QUEUE]

EQUAL = 1.0  # points within which two rows are called equal
# Student's t, 97.5 %, of 1 to 30 degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def runs(data):
    return [
        Run("cifar10", data, NETWORK, rule, depth, modules, EPOCHS, BATCH, "bf16", seed, auxiliary)
        for seed, (rule, depth, modules, auxiliary) in QUEUE
    ]


def table(rows):
    paper = dict(zip(ROWS, ACCURACY[NETWORK, "cifar10"], strict=True))
    bp = next((row for row in rows if row.what == METHODS["bp"]), None)
    spread = pooled_deviation([row.percent for row in rows])
    header = ["rule, nets", "K", "MACs / BP", "peak of a step", "accuracy, %", "seeds", "core minutes"]
    cells = [[*header, "to BP, 95 %", "verdict", "paper", "paper's gap"]]
    for row in rows:
        gap = ["", ""] if bp is None or row is bp else _gap(row.percent, bp.percent, spread)
        cells.append([row.what, *queued.columns(row), f"{_core_minutes(row):.0f}", *gap, *_of_paper(row, paper)])
    return cells


def _core_minutes(row):
    """Of one training of the row, without the tests between epochs; on a GPU of the GPU."""
    return min(_threads(made) * EPOCHS * epoch["seconds"] / 60 for made in row.records for epoch in made["history"])


def _threads(made):
    told = re.search(r"(\d+) threads", made["machine"]["device"])
    return int(told[1]) if told else 1


def _gap(ours, baseline, spread):
    difference = statistics.mean(ours) - statistics.mean(baseline)
    if spread is None:
        return [f"{difference:+.2f}", "one seed"]
    half = interval(len(ours), len(baseline), *spread)
    return [f"{difference:+.2f} ± {half:.2f}", verdict(difference, half)]


def verdict(difference, half):
    """What a difference with its interval's half width says."""
    if abs(difference) + half <= EQUAL:
        return "equal"
    if abs(difference) <= half:
        return "not decided"
    return "worse" if difference < 0 else "better"


def pooled_deviation(groups):
    """(standard deviation within groups, its degrees of freedom), or None where no group has two values."""
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    squares = sum((value - statistics.mean(values)) ** 2 for values in groups for value in values)
    return math.sqrt(squares / freedom), freedom


def interval(ours, baseline, deviation, freedom):
    """Half the width of the 95 % interval of a difference of two means, of so many values each."""
    return T[min(freedom, len(T)) - 1] * deviation * math.sqrt(1 / ours + 1 / baseline)


def _of_paper(row, paper):
    """The paper's accuracy and its gap to backpropagation, of a row that it has: its own cut."""
    settings = row.records[0]["settings"]
    figures = paper.get((settings["rule"], settings["depth"]))
    if figures is None or settings["modules"] or settings.get("auxiliary"):
        return ["", ""]
    gap = "" if row.what == METHODS["bp"] else f"{figures[0] - paper['bp', None][0]:+.2f}"
    return [f"{figures[0]:.2f}", gap]


def main(arguments=None):
    """Runs the program; returns the exit status."""
    return queued.main("study", __doc__, FILE, runs, table, arguments, analysis="study_analysis.py")


if __name__ == "__main__":
    sys.exit(main())
