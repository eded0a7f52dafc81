"""`auglocal calibrate`"""

from functools import partial

import torch
from tqdm import tqdm

from ..common.files import check_writable
from ..planning.calibration import calibration_file, machine, save
from ..planning.calibration_measure import measure
from .options import default_device

__all__ = ["calibrate_command"]


def calibrate_command(options):
    device = torch.device(options.device or default_device())
    about = machine(device, options.precision)
    check_writable(calibration_file(about), "XDG_CACHE_HOME")
    bar = partial(tqdm, desc="measuring", unit="module", leave=False, disable=None)
    samples = measure(device, options.precision, progress=bar)
    path = save(about, samples)
    threads = f", threads {about['threads']}" if about["threads"] else ""
    print(f"{len(samples):,} times of {about['device']}{threads}, {options.precision}, torch {about['torch']}")
    print(f"saved {path}")
    return 0
