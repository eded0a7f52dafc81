"""The paper's recipes, as presets of the options of a training; what an option is without one, its default.

CIFAR-10 and SVHN: batch 1024, learning rate 0.8; STL-10, 96x96 images: batch 128, learning rate 0.1; 400 epochs, which
the paper gives for the first two and is assumed for STL-10. ImageNet: batch 1024, learning rate 0.4, 200 epochs, which
the paper gives for ResNet-34; a warm-up as in its CIFAR recipe, and other networks as ResNet-34, are chosen the same.
"""

import os
from pathlib import Path

__all__ = ["DEFAULTS", "LEARNING_RATES", "PRESETS", "defaults_of"]

# Of every option of `auglocal train`; None: see its help.
DEFAULTS = {
    "data": "digits",
    "download": False,
    "workers": 0,
    "image_size": None,
    "val_split": 0.0,
    "model": "resnet20",
    "weights": None,
    "rule": "auglocal",
    "depth": 4,
    "form": None,
    "auxiliary": "paper",
    "modules": None,
    "units": None,
    "freeze": None,
    "freeze_norms": False,
    "precision": "fp32",
    "recompute": False,
    "sync_bn": False,
    "budget": None,
    "prefer": "arithmetic",
    "accumulate": 1,
    "clip_grad_norm": None,
    "clip_grad_value": None,
    "clip": "module",
    "model_ema": False,
    "model_ema_decay": 0.999,
    "epochs": 15,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": None,
    "momentum": None,
    "weight_decay": None,
    "norm_weight_decay": None,
    "bias_weight_decay": None,
    "schedule": "cosine",
    "warmup": None,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "device": None,
    "seed": 0,
    "max_seconds": None,
    "patience": None,
    "nonfinite": "stop",
    "quiet": False,
    "preset": None,
    "name": None,
    "runs": Path("runs"),
    "checkpoint_minutes": 10.0,
    "stages": None,
    "tensorboard": False,
}

_CIFAR = {"model": "resnet32", "depth": 4, "epochs": 400, "batch_size": 1024, "schedule": "paper"}

PRESETS = {
    "cifar10": {**_CIFAR, "data": "cifar10:data"},
    "svhn": {**_CIFAR, "data": "svhn:data"},
    "stl10": {**_CIFAR, "data": "stl10:data", "batch_size": 128},
    "imagenet": {
        "data": None,  # to be given
        "workers": len(os.sched_getaffinity(0)),
        "model": "resnet34",
        "depth": 5,
        "epochs": 200,
        "batch_size": 1024,
    },
}

# Of SGD, for a batch of 128; in proportion for another one.
LEARNING_RATES = {None: 0.1, "cifar10": 0.1, "svhn": 0.1, "stl10": 0.1, "imagenet": 0.05}


def defaults_of(preset):
    """Every option's value with a preset, or None, where nothing else is given."""
    return DEFAULTS | PRESETS.get(preset, {})
