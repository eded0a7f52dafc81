"""Results of trainings as JSON lines, one training a line: what was run, on what, and what came out.

A record:
    settings    what decides the outcome: dataset, data, model, rule, depth, modules, epochs, batch_size, lr, precision,
                seed, train_images, test_images, ...
    machine     device, versions of torch, Python and this package, commit
    local_modules, macs_per_bp    of the cut: number of modules, multiply-accumulates against backpropagation's
    accuracy    {"last", "best"}: of the last and of the best epoch on the test images, 0 to 1; top5 likewise where it
                was measured
    seconds     spent training, without the tests between epochs
    peak_bytes  the highest memory of a step, without images that loaders hold on its device
    history     one dict per epoch, see `auglocal_ext.TrainResult`
"""

import json
import platform
import subprocess
from pathlib import Path

import torch

import auglocal_ext


def machine(device):
    """What a figure depends on besides the code and its settings."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
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


def _processor():
    if not Path("/proc/cpuinfo").exists():
        return platform.processor() or platform.machine()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(': ')[1]}, {torch.get_num_threads()} threads" if models else platform.machine()


def record(settings, device, result, data_bytes=0):
    """The record of a finished training.

    Args:
        settings: dict of plain values.
        device: where it ran.
        result: `auglocal_ext.TrainResult` of a training with a val_loader.
        data_bytes: of images that loaders hold on a GPU, which result.peak_bytes counts too.
    """
    history, plan = result.history, result.plan
    made = {
        "settings": settings,
        "machine": machine(device),
        "local_modules": len(plan.modules),
        "macs_per_bp": plan.macs / plan.bp_macs,
        "accuracy": _last_and_best([entry["val_accuracy"] for entry in history]),
        "seconds": sum(entry["seconds"] for entry in history),
        "peak_bytes": result.peak_bytes - data_bytes,
        "history": history,
    }
    top5 = [entry.get("val_top5_accuracy") for entry in history]
    return made | ({"top5": _last_and_best(top5)} if None not in top5 else {})


def _last_and_best(values):
    return {"last": values[-1], "best": max(values)}


def check_writable(path, option):
    """Raises OSError where a file cannot be written: to be known before the training, not after it."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}: {error.filename}; choose another {option}"
        ) from None
    if not existed:
        path.unlink()


def append(path, made):
    """Adds one record to a file of them, which is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(made) + "\n")  # one write: an interruption leaves whole lines


def read(*paths):
    """The records of some files, in order; a file that does not exist has none."""
    found = []
    for path in map(Path, paths):
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not a record: {error}; remove that line") from None
    return found
