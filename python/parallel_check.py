"""Do several processes train as one does? And what happens where one is killed?

    python python/parallel_check.py --data ROOT [--ranks 2 4] [--steps 20] [--json FILE]

ResNet-32 in float64 on real images, ROOT with a folder of them per class. Of every rule and number of ranks: data
parallel with synchronised BatchNorm against one process on the whole batches, the largest difference of a weight after
all steps; layer parallel, synchronous and decoupled, whose weights have to be those of one process to the bit. Then a
rank is killed in the third step of the second epoch: how long the others take to end, what they say, and whether the
training goes on from its checkpoint, with one rank less too.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import auglocal_ext
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, whole
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.data import images_in_memory, mean_and_std
from auglocal_ext.distributed.group import on_its_own
from auglocal_ext.models import resnet32
from auglocal_ext.stages.stage import Stage
from auglocal_ext.stages.trainer import StageTrainer

sys.path.insert(0, str(Path(__file__).parent))
from records import machine

# A tenth of the usual rate: at that, twenty steps of backpropagation blow rounding up to 0.4.
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
CUTS = {  # rule -> LocalTrainer's arguments
    "auglocal": {"modules": 6, "depth": 3, "optimizer": SGD},
    "dgl": {"rule": "dgl", "modules": 6, "optimizer": SGD},
    "bp": {"rule": "bp", "optimizer": SGD},
}
# Of a weight, data parallel, after twenty steps in float64. Backpropagation multiplies rounding, 1e-15 in the first.
BOUNDS = {"auglocal": 1e-9, "dgl": 1e-9, "bp": 1e-3}
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


def by_one(given, cut):
    trained = model()
    with on_its_own():
        trainer = auglocal_ext.LocalTrainer(trained, **cut)
        for images, labels in given:
            trainer.step(images, labels)
    return trained.state_dict()


def data_parallel(settings, rule):
    rank, ranks, trained = dist.get_rank(), dist.get_world_size(), model()
    trainer = auglocal_ext.LocalTrainer(trained, sync_batch_norm=True, **CUTS[rule])
    given = batches(settings)
    for images, labels in given:
        share = len(images) // ranks
        part = slice(rank * share, (rank + 1) * share)
        trainer.step(images[part].contiguous(memory_format=torch.channels_last), labels[part])
    return _largest(trained.state_dict(), by_one(given, CUTS[rule])) if rank == 0 else None


def layer_parallel(settings, rule, schedule):
    given = batches(settings)
    trainer = StageTrainer(model(), *given[0], schedule=schedule, balance="arithmetic", **CUTS[rule])
    trainer.epoch(given)
    whole_model = trainer.gather()
    return None if whole_model is None else _largest(whole_model, by_one(given, CUTS[rule]))


def _largest(ours, theirs):
    """The largest difference of a value."""
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)


# ---- a rank that is killed -------------------------------------------------------------------------------------------


def killed(settings, folder, dies):
    """Trains two epochs of four steps by stages; the last rank is killed in its third step of the second one if it is
    to die."""
    given = batches(settings)[:4]

    def after_epoch(entry):
        if dies and entry["epoch"] == 1 and dist.get_rank() == dist.get_world_size() - 1:
            run, steps = Stage.run, []

            def until_the_third(*arguments):
                steps.append(None)
                if len(steps) == 3:
                    os._exit(9)
                return run(*arguments)

            Stage.run = until_the_third

    result = auglocal_ext.train_stages(
        model(), given, epochs=2, checkpoint=folder, on_epoch=after_epoch, progress=False, seed=0, **CUTS["auglocal"]
    )
    return [entry["loss"] for entry in result.history]


# ---- all of it -------------------------------------------------------------------------------------------------------


def _rank(rank, ranks, folder, work, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT))
    try:
        found = work(*arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def by_ranks(work, ranks, *arguments):
    """(what each rank found, or None of one that was killed; seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, work, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        ended = {}
        while len(ended) < ranks:
            for rank, process in enumerate(processes):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.monotonic()
            time.sleep(0.05)
        files = [Path(folder, f"{rank}.json") for rank in range(ranks)]
        found = [json.loads(file.read_text()) if file.exists() else None for file in files]
        return found, max(ended.values()) - min(ended.values()), time.monotonic() - began


def check(settings):
    """Runs all, prints a line for each; returns the exit status."""
    if settings.json:
        check_writable(settings.json, "--json")
    rows, good = [], True

    def note(ok, line, **row):
        nonlocal good
        good &= ok
        rows.append({**row, "ok": ok})
        print(f"{'ok  ' if ok else 'FAIL'} {line}", flush=True)

    for ranks in settings.ranks:
        for rule in CUTS:
            (largest, *_), _, seconds = by_ranks(data_parallel, ranks, settings, rule)
            line = f"{rule}, data parallel, {ranks} ranks: weights differ by {largest}; {seconds:.0f} s"
            ok = isinstance(largest, float) and largest <= BOUNDS[rule]
            note(ok, line, rule=rule, form="data parallel", ranks=ranks, difference=largest)
        for rule in ("auglocal", "dgl"):
            for schedule in ("synchronous", "decoupled"):
                (largest, *_), _, seconds = by_ranks(layer_parallel, ranks, settings, rule, schedule)
                line = f"{rule}, {schedule} stages, {ranks} ranks: weights differ by {largest}; {seconds:.0f} s"
                note(largest == 0.0, line, rule=rule, form=schedule, ranks=ranks, difference=largest)
        with tempfile.TemporaryDirectory() as folder:
            straight = by_ranks(killed, ranks, settings, f"{folder}/straight", False)[0][0]
            found, lag, _ = by_ranks(killed, ranks, settings, f"{folder}/killed", True)
            told = [one for one in found if one is not None]
            ok = lag < KILL_SECONDS and len(told) == ranks - 1 and all("RankFailed" in str(one) for one in told)
            note(
                ok, f"a rank of {ranks} is killed: the others ended within {lag:.1f} s: {told[0]}", ranks=ranks, lag=lag
            )
            for fewer in (ranks, ranks - 1):
                saved = Path(folder, f"killed-{fewer}")
                shutil.copytree(Path(folder, "killed"), saved)
                again = by_ranks(killed, fewer, settings, str(saved), False)[0][0]
                ok = again == straight
                note(ok, f"gone on from by {fewer} ranks: losses {again}, never stopped {straight}", ranks=fewer)
    about = {"steps": settings.steps, "batch_size": settings.batch_size, **machine("cpu")}
    if settings.json:
        write_json(settings.json, {**about, "rows": rows})
    return 0 if good else 1


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
