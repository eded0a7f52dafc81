"""Results of trainings as JSON lines, one training a line: what was run, on what, and what came out.

A record:
    settings    what decides the outcome: dataset, data, model, rule, depth, modules, epochs, batch_size, lr, precision,
                seed, train_images, test_images, ...
    machine     device, versions of torch, Python and this package, commit
    local_modules, macs_per_bp    of the cut: number of modules, multiply-accumulates against backpropagation's
    accuracy    {"last", "best"}: of the last and of the best epoch on the test images, 0 to 1; top5 likewise where it
                was measured
    test_accuracy   of the last epoch on the test images, where accuracy is of validation images (--val-split)
    seconds     spent training, without the tests between epochs
    peak_bytes  the highest memory of a step, without images that loaders hold on its device
    stopped     why there are fewer epochs than settings tell, see `auglocal_ext.TrainResult`; only where there are
    history     one dict per epoch, see `auglocal_ext.TrainResult`
"""

import json
import platform
import subprocess
from pathlib import Path

import torch

import auglocal_ext
from auglocal_ext.common.device import name_of_processor
from auglocal_ext.common.files import append_line

FIELDS = {"settings", "machine", "local_modules", "macs_per_bp", "accuracy", "seconds", "peak_bytes"}


def machine(device):
    """What a figure depends on besides the code and its settings."""
    device = torch.device(device)
    if device.type != "cuda":
        name = f"{name_of_processor()}, {torch.get_num_threads()} threads"
    else:  # torch computes convolutions of float32 in TF32 there, matrix products not
        name = torch.cuda.get_device_name(device) + ", TF32 convolutions" * torch.backends.cudnn.allow_tf32
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "auglocal_ext": auglocal_ext.__version__,
        "commit": _commit(),
    }


def _commit():
    """Empty where this is no checkout, or git is not there to tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def record(settings, device, result):
    """The record of a finished training.

    Args:
        settings: dict of plain values.
        device: where it ran.
        result: `auglocal_ext.TrainResult` of a training with a val_loader.
    """
    history, plan = result.history, result.plan
    made = {
        "settings": settings,
        "machine": machine(device),
        "local_modules": len(plan.modules),
        "macs_per_bp": plan.macs / plan.bp_macs,
        "accuracy": _last_and_best([entry["val_accuracy"] for entry in history]),
        "seconds": sum(entry["seconds"] for entry in history),
        "peak_bytes": result.peak_bytes,
        "history": history,
    }
    if result.stopped:
        made["stopped"] = result.stopped
    top5 = [entry.get("val_top5_accuracy") for entry in history]
    return made | ({"top5": _last_and_best(top5)} if None not in top5 else {})


def _last_and_best(values):
    return {"last": values[-1], "best": max(values)}


def append(path, made):
    """Adds one record to a file of them, which is made where there is none; OSError where it cannot be written."""
    append_line(path, json.dumps(made), _is_json)


def is_of_trainings(path):
    """Whether a file's first line is a record of a training."""
    with Path(path).open("rb") as file:
        first = file.readline()
    made = json.loads(first) if _is_json(first) else None
    return isinstance(made, dict) and made.keys() >= FIELDS


def read(*paths, fields=FIELDS, what="a training"):
    """The records of some files, in order; a file that does not exist has none.

    A last line that a kill has cut off is none: the next record takes its place.

    Args:
        fields: what a record must have.
        what: what it is a record of, for errors.
    """
    found = []
    for path in map(Path, paths):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if lines and not _is_json(lines[-1]):  # it has no end; behind a whole line it is empty
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not _is_json(line):
                raise ValueError(f"{path}, line {number}, is not a record, but {_shown(line)}: remove that line")
        for number, made in enumerate(map(json.loads, lines), 1):
            if not isinstance(made, dict) or not made.keys() >= fields:
                raise ValueError(f"{path}, line {number}, is not a record of {what}: remove it, or that file")
            found.append(made)
    return found


def _is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _shown(line):
    return repr(line[:40].decode(errors="replace"))
