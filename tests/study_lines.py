"""Made-up records of the accuracy study, and lines of its analysis, for the tests of what reads them."""

UNITS = ["stem", "layer1.0", "layer2.0", "layer3.0"]
MACHINE = {"device": "one", "torch": "2", "python": "3", "commit": "abc"}
TIMES = {"seconds": 480, "history": [{"seconds": 300}, {"seconds": 180}]}


def settings(rule, seed=0, **more):
    made = {"dataset": "cifar10", "data": "imagefolder:x", "model": "resnet32", "rule": rule, "depth": None}
    made |= {"modules": None, "epochs": 10, "batch_size": 128, "precision": "bf16", "seed": seed, **more}
    return made | {"train_images": 50_000}


def record(rule, accuracy, count=1, seed=0, **more):
    """Of count local modules; more: settings."""
    made = {"settings": settings(rule, seed, **more), "machine": MACHINE, "local_modules": count, "macs_per_bp": 1.0}
    return made | {"accuracy": {"last": accuracy, "best": accuracy}, "peak_bytes": 10**7 // count} | TIMES


def line(rule, similarity, probes=(0.2, 0.4, 0.5, 0.7), count=1, seed=0, **more):
    """similarity, probes: of the four units; more: settings."""
    matrix = [[value if row == column else 0.0 for column in range(4)] for row, value in enumerate(similarity)]
    made = {"settings": settings(rule, seed, **more), "machine": MACHINE, "local_modules": count}
    return made | {"reference": "bp_seed0.pt", "units": UNITS, "cka": matrix, "probes": list(probes)}
