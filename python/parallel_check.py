"""Do several processes train as one does? And what happens where one is killed?

    python python/parallel_check.py --data ROOT [--ranks 2 4] [--steps 20] [--json FILE]

ResNet-32 in float64 on real images, ROOT with a folder of them per class. Of every rule and number of ranks: data
parallel with synchronised BatchNorm against one process on the whole batches, the largest difference of a weight after
the first step and after all; layer parallel, synchronous and decoupled, whose weights have to be those of one process
to the bit. Then a rank is killed in the third step of the second epoch, in both forms: how long the others take to end,
what they say, and whether the training goes on from its checkpoint, with one rank less too.

Ranks add in another order than one process does, so data parallel differs by rounding. Training makes rounding grow.
How much that is, one process shows: on the same batches, their images in other orders, which changes nothing but the
order of sums. Ten times that is the bound. Backpropagation of a fresh network at the learning rate of the others makes
it grow by 1e14 in twenty steps, which leaves nothing to compare: its rate is a hundredth of theirs.
"""

import math
import os
import shutil
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

import auglocal_ext
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, whole
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.data import images_in_memory, mean_and_std
from auglocal_ext.models import resnet32
from auglocal_ext.stages.stage import Stage
from auglocal_ext.stages.trainer import StageTrainer

sys.path.insert(0, str(Path(__file__).parent))
from records import machine
from spawned import by_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
CUTS = {  # rule -> LocalTrainer's arguments
    "auglocal": {"modules": 6, "depth": 3, "optimizer": SGD},
    "dgl": {"rule": "dgl", "modules": 6, "optimizer": SGD},
    "bp": {"rule": "bp", "optimizer": partial(SGD, lr=0.001)},
}
ORDERS = (1, 2)  # seeds of the orders of images in which one process trains again
TIMES = 10  # rounding's share of a difference that several processes may make
KILL_SECONDS, TIMEOUT = 30, 20


def batches(settings):
    """Of real images, normalised, float64."""
    from torchvision.datasets import ImageFolder

    count = settings.steps * settings.batch_size
    dataset = ImageFolder(settings.data)
    picks = range(0, len(dataset), max(1, len(dataset) // count))
    images, labels = images_in_memory(torch.utils.data.Subset(dataset, list(picks)[:count]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.as_tensor(values, dtype=torch.float64)[:, None, None] for values in mean_and_std(images))
    images = ((images[order].double() / 255 - mean) / std).to(memory_format=torch.channels_last)
    size = settings.batch_size
    return list(zip(images.split(size), labels[order].split(size), strict=True))


def model():
    torch.manual_seed(0)
    return resnet32().double()


def by_one(settings, rule, file):
    """Trains in one process, and saves the weights after the first step and after all."""
    torch.save(_trained(batches(settings), rule), file)


def in_other_orders(settings, rule, file):
    """Of the weights after the first step and after all, how much they differ from the file's where the images of each
    batch come in another order: what rounding makes of a training."""
    found = []
    for seed in ORDERS:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(settings.batch_size, generator=generator) for _ in range(settings.steps)]
        given = [(x[order], y[order]) for (x, y), order in zip(batches(settings), orders, strict=True)]
        found.append(_differences(_trained(given, rule), file))
    return [max(values) for values in zip(*found, strict=True)]


def data_parallel(settings, rule, file):
    """The differences that `in_other_orders` has, of ranks that have a share of each batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    given = [[part.chunk(ranks)[rank] for part in batch] for batch in batches(settings)]
    return _differences(_trained(given, rule, sync_batch_norm=True), file)


def _trained(given, rule, **options):
    """The weights after the first step and after all."""
    trained, found = model(), []
    trainer = auglocal_ext.LocalTrainer(trained, **CUTS[rule], **options)
    for step, (images, labels) in enumerate(given):
        trainer.step(images.contiguous(memory_format=torch.channels_last), labels)
        if step in (0, len(given) - 1):
            found.append({name: value.clone() for name, value in trained.state_dict().items()})
    return found


def _differences(found, file):
    return [_largest(ours, theirs) for ours, theirs in zip(found, torch.load(file), strict=True)]


def layer_parallel(settings, rule, file, schedule):
    given = batches(settings)
    trainer = StageTrainer(model(), *given[0], schedule=schedule, balance="arithmetic", **CUTS[rule])
    trainer.epoch(given)
    whole_model = trainer.gather()
    return None if whole_model is None else _largest(whole_model, torch.load(file)[-1])


def _largest(ours, theirs):
    """The largest difference of a value."""
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)


# ---- a rank that is killed -------------------------------------------------------------------------------------------


IN_A_STEP = {"layer parallel": (Stage, "run"), "data parallel": (auglocal_ext.LocalTrainer, "step")}  # of each form


def killed(settings, form, images, folder, dies):
    """Trains two epochs of four steps by batches of so many images, together; the last rank is killed in its third step
    of the second one if it is to die."""
    given = [(x[:images], labels[:images]) for x, labels in batches(settings)[:4]]

    def after_epoch(entry):
        if dies and entry["epoch"] == 1 and dist.get_rank() == dist.get_world_size() - 1:
            steps, (owner, name) = [], IN_A_STEP[form]
            step = getattr(owner, name)

            def until_the_third(*arguments):
                steps.append(None)
                if len(steps) == 3:
                    os._exit(9)
                return step(*arguments)

            setattr(owner, name, until_the_third)

    options = {"epochs": 2, "checkpoint": folder, "on_epoch": after_epoch, "progress": False, "seed": 0}
    options |= CUTS["auglocal"]
    if form == "layer parallel":
        result = auglocal_ext.train_stages(model(), given, **options)
    else:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = [(x.chunk(ranks)[rank], labels.chunk(ranks)[rank]) for x, labels in given]
        result = auglocal_ext.train(model(), own, sync_batch_norm=True, **options)
    return [entry["loss"] for entry in result.history]


# ---- all of it -------------------------------------------------------------------------------------------------------


class Notes:
    """What was found: a line each is printed, and a row kept."""

    def __init__(self):
        self.rows = []

    def add(self, ok, line, **row):
        self.rows.append({**row, "ok": ok})
        print(f"{'ok  ' if ok else 'FAIL'} {line}", flush=True)


def check_trainings(settings, ranks, weights, rounding, notes):
    """Of every rule and form; weights: rule -> the file of one process; rounding: what `in_other_orders` found."""
    for rule, file in weights.items():
        (found, *_), _ = by_ranks(data_parallel, ranks, settings, rule, file, seconds=TIMEOUT)
        bounds = [TIMES * value for value in rounding[rule]]
        ok = isinstance(found, list) and all(ours <= bound for ours, bound in zip(found, bounds, strict=True))
        line = f"{rule}, data parallel, {ranks} ranks: weights differ by {_text(found)}, at most {_text(bounds)}"
        notes.add(ok, line, rule=rule, form="data parallel", ranks=ranks, differences=found)
    for rule in ("auglocal", "dgl"):
        for form in ("synchronous", "decoupled"):
            (largest, *_), _ = by_ranks(layer_parallel, ranks, settings, rule, weights[rule], form, seconds=TIMEOUT)
            line = f"{rule}, {form}, {ranks} ranks: weights differ by {largest}, at most 0"
            notes.add(largest == 0, line, rule=rule, form=form, ranks=ranks, differences=[largest])


def _text(found):
    """Of differences after the first step and after all."""
    return " and ".join(f"{value:.1e}" for value in found) if isinstance(found, list) else found


def check_a_kill(settings, form, ranks, notes):
    shares = ranks * (ranks - 1)
    images = max(1, settings.batch_size // shares) * shares  # equal shares, of one rank less too
    exact = form == "layer parallel"  # else ranks add in another order
    with tempfile.TemporaryDirectory() as folder:

        def train(count, name, dies=False):
            return by_ranks(killed, count, settings, form, images, f"{folder}/{name}", dies, seconds=TIMEOUT)

        straight = train(ranks, "straight")[0][0]
        found, lag = train(ranks, "killed", True)
        told = [one for one in found if one is not None]
        ok = lag < KILL_SECONDS and len(told) == ranks - 1 and all("RankFailed" in str(one) for one in told)
        line = f"{form}, one of {ranks} ranks is killed: the others ended within {lag:.1f} s: {told[0]}"
        notes.add(ok, line, form=form, ranks=ranks, lag=lag)
        for fewer in (ranks, ranks - 1):
            shutil.copytree(Path(folder, "killed"), Path(folder, f"killed-{fewer}"))
            again = train(fewer, f"killed-{fewer}")[0][0]
            ok = isinstance(again, list) and isinstance(straight, list)
            ok = ok and (again == straight if exact else all(map(math.isclose, again, straight)))
            line = f"{form}, gone on from by {fewer} of {ranks} ranks: losses {again}, never stopped {straight}"
            notes.add(ok, line, form=form, ranks=ranks, gone_on_by=fewer)


def check(settings):
    """Runs all, prints a line for each; returns the exit status."""
    if settings.json:
        check_writable(settings.json, "--json")
    notes = Notes()
    with tempfile.TemporaryDirectory() as folder:
        weights = {rule: f"{folder}/{rule}.pt" for rule in CUTS}
        rounding = {}
        for rule, file in weights.items():
            by_ranks(by_one, 1, settings, rule, file)
            (found,), _ = by_ranks(in_other_orders, 1, settings, rule, file)
            line = f"{rule}, one process, images in other orders: weights differ by {_text(found)}"
            notes.add(isinstance(found, list), line, rule=rule, ranks=1, differences=found)
            rounding[rule] = found if isinstance(found, list) else [0.0, 0.0]
        for ranks in settings.ranks:
            check_trainings(settings, ranks, weights, rounding, notes)
            for form in IN_A_STEP:
                check_a_kill(settings, form, ranks, notes)
    if settings.json:
        about = {"steps": settings.steps, "batch_size": settings.batch_size, **machine("cpu")}
        write_json(settings.json, {**about, "rows": notes.rows})
    return 0 if all(row["ok"] for row in notes.rows) else 1


def main(arguments=None):
    """Runs the program; returns the exit status."""
    parser = Parser("parallel_check", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="ROOT", help="a folder of images per class, all of one size")
    add("--ranks", type=whole(2), nargs="+", default=[2, 4], help="numbers of processes (default: 2 4)")
    add("--steps", type=whole(4), default=20, help="(default: %(default)s)")
    add("--batch-size", type=whole(8), default=16, help="(default: %(default)s)")
    add("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args(arguments)
    return errors.run("parallel_check", lambda: check(settings))


if __name__ == "__main__":
    sys.exit(main())
