"""What data costs: the loader's share of a training step's time.

    python python/bench_loader.py [--device cpu|cuda] [--batch-size 1024] [--precision fp32|bf16] [--json FILE]

The loader alone, with CIFAR-10's augmentation, and the step of ResNet-32 with aux nets of depth 4 alone, in images per
second; the share is of the time of both, one after the other.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

import auglocal_ext
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, device, number, whole
from auglocal_ext.common.checks import PRECISIONS
from auglocal_ext.common.files import check_writable, write_json
from auglocal_ext.data.device_loader import DeviceLoader, mean_and_std
from auglocal_ext.data.sources import AUGMENTATIONS
from auglocal_ext.models import resnet32

sys.path.insert(0, str(Path(__file__).parent))
from records import machine

BATCHES = 8  # in the loader: enough that shuffling has its part


def measure(device, batch_size, precision, seconds):
    """Dict of images per second and the share."""

    images = torch.randint(0, 256, (BATCHES * batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    augmented = {"augment": True, **AUGMENTATIONS["cifar10"]}
    loader = DeviceLoader(images, labels, batch_size, *mean_and_std(images), **augmented, device=device)
    trainer = auglocal_ext.LocalTrainer(resnet32().to(device), depth=4, precision=precision)
    batch = next(iter(loader))
    trainer.step(*batch)  # plans, and makes the optimizers' state

    def one_pass():
        for _ in loader:
            pass

    loading = _seconds(one_pass, seconds) / BATCHES
    step = _seconds(lambda: trainer.step(*batch), seconds)
    return {
        "loader_images_per_second": batch_size / loading,
        "step_images_per_second": batch_size / step,
        "share": loading / (loading + step),
    }


def _seconds(run, seconds):
    """Of one run, the median; on CUDA of many between two waits for the device."""
    from torch.utils.benchmark import Timer  # warns where a CUDA toolkit is without a GPU

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def parse(arguments=None):
    """The options of `bench`."""
    parser = Parser("bench_loader", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=whole(2), default=1024)
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--seconds", type=number(0), default=2, help="measuring time per figure")
    add("--json", type=Path, help="also write the figures here")
    return parser.parse_args(arguments)


def bench(options):
    """Measures and prints; returns the exit status."""
    if options.json:
        check_writable(options.json, "--json")
    about = {"batch_size": options.batch_size, "precision": options.precision, **machine(options.device)}
    figures = measure(options.device, options.batch_size, options.precision, options.seconds)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"loader {figures['loader_images_per_second']:,.0f} images/s, step {figures['step_images_per_second']:,.0f} "
        f"images/s: the loader is {figures['share']:.2%} of both"
    )
    if options.json:
        write_json(options.json, {**about, **figures})
    return 0


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("bench_loader", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
