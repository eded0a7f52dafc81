"""Kills real trainings at drawn moments, lets them go on, and compares their weights with undisturbed ones, to the bit.

    python python/kill_check.py [--kills 60] [--seed 0] [--out benchmarks/results/kills.jsonl]

Every rule, local ones with one module per unit and with two. A third of the kills come in the middle of writing a
checkpoint, between the file that is written beside and its renaming. Each training adds a line to the file: its kills,
where they left it, whether the weights were equal. Half of the trainings write a checkpoint after every step. The exit
status is 1 where some were not equal.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from records import machine

from auglocal_ext import data, models, rules, train
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, whole
from auglocal_ext.common.files import append_line, check_writable

EPOCHS = 12
CASES = [{"rule": rule} for rule in rules.RULES] + [
    {"rule": rule, "modules": 2} for rule, kind in rules.RULES.items() if not issubclass(kind, rules.BP)
]


def training(case, folder, minutes=10):
    """Trains; returns the weights. minutes: 0 for a checkpoint after every step, not only every epoch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "a step of this cut needs")  # of so small a net
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (96, 3, 16, 16), dtype=torch.uint8, generator=generator)
    mean, std = data.mean_and_std(images)
    loader = data.DeviceLoader(images, torch.arange(96) % 10, 32, mean, std, augment=True, pad=2, flip=True)
    model = models.CifarResNet(1)
    rule = rules.for_images(case["rule"], mean.tolist(), std.tolist())
    options = {"seed": 3, "progress": False, "modules": case.get("modules"), "checkpoint_minutes": minutes}
    train(model, loader, 2, rule=rule, epochs=EPOCHS, checkpoint=folder, **options)
    return model.state_dict()


# Kills itself in the middle of a drawn write of a checkpoint: half of the file is there, beside.
IN_A_WRITE = """
import io, os, signal
from auglocal_ext.training import checkpoint
real, left = checkpoint.write_whole, [{left}]
def write_whole(path, write):
    left[0] -= 1
    def half(file):
        whole = io.BytesIO()
        write(whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, write if left[0] else half)
checkpoint.write_whole = write_whole
"""
CHILD = """
import sys
sys.path.insert(0, {here!r})
import torch, kill_check
{before}
print("begins", flush=True)
torch.save(kill_check.training({case!r}, {folder!r}, {minutes}), {folder!r} + "/final.pt")
"""


def attempt(case, folder, minutes, draw, how):
    """One process, which is killed "at a moment" or "in a write", or runs to its "end"."""
    before = IN_A_WRITE.format(left=draw.randint(1, 4 if minutes else 12)) if how == "in a write" else ""
    given = {"case": case, "folder": str(folder), "minutes": minutes}
    program = CHILD.format(here=str(Path(__file__).parent), before=before, **given)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        if how == "at a moment":
            time.sleep(draw.uniform(0.1, 2.5))
            process.kill()
        process.wait()
    finally:
        process.kill()
        process.communicate()
    return process.returncode


def killed_training(case, kills, draw):
    """A training that is killed so often before it may end: what is written of it."""
    told, minutes = [], draw.choice((0, 10))
    with tempfile.TemporaryDirectory() as folder:
        for index in range(kills):
            how = "in a write" if index % 3 == 0 else "at a moment"
            if attempt(case, folder, minutes, draw, how) == 0:
                break  # it had ended before
            last = Path(folder) / "last.pt"
            left = torch.load(last) if last.exists() else {"epoch": 0, "sums": None}
            step = left["sums"]["steps"] if left["sums"] else 0
            told.append({"killed": how, "epoch": left["epoch"], "step": step})
        status = attempt(case, folder, minutes, draw, "end")
        final = torch.load(Path(folder) / "final.pt") if status == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        expected = training(case, folder)
    equal = final.keys() == expected.keys() and all(torch.equal(final[key], expected[key]) for key in expected)
    return {"case": case, "minutes": minutes, "kills": told, "status": status, "equal": equal}


def check(options):
    check_writable(options.out, "--out")
    draw, done, equal = random.Random(options.seed), 0, True
    here = machine("cpu")
    while done < options.kills:
        for case in CASES:
            found = killed_training(case, min(4, options.kills - done), draw)
            append_line(options.out, json.dumps(found | here), lambda line: line.endswith(b"}"))
            done, equal = done + len(found["kills"]), equal and found["equal"]
            in_writes = sum(kill["killed"] == "in a write" for kill in found["kills"])
            outcome = "equal" if found["equal"] else "DIFFERS"
            print(f"{case}: {len(found['kills'])} kills, {in_writes} in a write: {outcome}", flush=True)
            if done >= options.kills:
                break
    print(f"{done} kills, {'all weights equal' if equal else 'SOME WEIGHTS DIFFER'}")
    return 0 if equal else 1


def main(arguments=None):
    parser = Parser(prog="kill_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=whole(1), default=60, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of their moments (default: %(default)s)")
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results / "kills.jsonl", help="(default: %(default)s)")
    return errors.run("kill_check", lambda: check(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
