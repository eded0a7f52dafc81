"""`auglocal analyze`"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .. import __version__, report
from ..analysis.cka import products
from ..analysis.features import Features
from ..analysis.probes import accuracies
from ..common.files import check_writable, write_json
from ..training.evaluate import evaluation
from .checks import check_image_size, on_meta
from .evaluate import check_classes, trained
from .job import load_data
from .options import default_device
from .runs import options_of, read_settings

__all__ = ["analyze_command"]


@dataclass(frozen=True)
class _Run:
    """name: which no other run has."""

    folder: Path
    name: str
    settings: dict
    model: nn.Module
    normalise: nn.Module  # images of the data as this run knows them


def analyze_command(given):
    """Compares what runs' units have learnt; leaves analysis.json, pictures and report.html."""
    folders = list({folder.resolve(): folder for folder in (*given.runs, given.reference or given.runs[0])}.values())
    settings = [read_settings(folder) for folder in folders]
    first, reference = settings[0], _index(folders, given.reference or given.runs[0])
    options = _options(given, folders[0], first)
    where, out = given.data or options.data, given.out or folders[0] / "analysis"
    for name in ("analysis.json", "report.html"):
        check_writable(out / name, "--out")
    source = load_data(options, where, normalisation=(first["mean"], first["std"]))
    size = source.description["image_size"]
    for folder, its in zip(folders, settings, strict=True):
        check_classes(source, its, folder, where)
        check_image_size(on_meta(its["options"]["model"], source.num_classes), *size, "--data")
    runs = [
        _Run(folder, name, its, trained(folder, its).to(options.device), _Renormalise(first, its).to(options.device))
        for folder, name, its in zip(folders, _names(folders), settings, strict=True)
    ]
    found = _analysed(runs, reference, source, given, options)
    found |= {"data": where, "batch_size": options.batch_size, "device": options.device}
    found["versions"] = {"auglocal_ext": __version__, "torch": torch.__version__}
    if not given.no_probes:
        found["versions"]["scikit-learn"] = version("scikit-learn")
    files = report.analysis_report(found, out)
    write_json(out / "analysis.json", found)
    for run in found["runs"]:
        best = f", best linear probe {max(run['probes']):.2%}" if run["probes"] else ""
        print(f"{run['name']}: test accuracy {run['test_accuracy']:.2%}{best}")
    print(f"saved to {out}: analysis.json, {', '.join(files)}")
    return 0


def _options(given, folder, settings):
    """Those by which data are read: the run's, below what was given."""
    options = options_of(folder, settings, leave_out=("device",))
    options.batch_size, options.download, options.quiet = given.batch_size, given.download, given.quiet
    if given.workers is not None:
        options.workers = given.workers
    options.device = given.device or default_device()
    return options


def _index(folders, wanted):
    return [folder.resolve() for folder in folders].index(wanted.resolve())


def _names(folders):
    """The folders' own names, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _analysed(runs, reference, source, given, options):
    """What was found, of plain values."""
    test, train = source.test.sample(given.images), source.train.sample(given.images)
    features, progress = [Features(run.model, run.normalise) for run in runs], not options.quiet
    alike = products(features, test, progress=progress, labels=[run.name for run in runs])
    found = []
    for run, its in zip(runs, features, strict=True):
        tested = evaluation(nn.Sequential(run.normalise, run.model), test, progress=progress)
        probes = None
        if not given.no_probes:
            probes = [accuracy for _, accuracy in accuracies(its, train, test, progress)]
        of_run = {name: run.settings["options"].get(name) for name in ("model", "rule", "depth")}
        found.append(
            {"name": run.name, "folder": str(run.folder), **of_run, "units": its.names}
            | {"test_accuracy": tested.top1, "probes": probes, **_of_last_epoch(run.folder)}
        )
    # Each with the reference, and with itself.
    pairs = [(index, reference) for index in range(len(runs)) if index != reference]
    pairs += [(index, index) for index in range(len(runs))]
    cka = [{"rows": a, "columns": b, "matrix": alike.between(a, b).matrix.tolist()} for a, b in pairs]
    images = {"cka_images": alike.images, "test_images": tested.images}
    images["train_images"] = None if given.no_probes else train.state_dict()["images"]
    return {"runs": found, "reference": reference, "cka": cka, **images}


def _of_last_epoch(folder):
    """What a run's history tells of its local modules; of one that has none, None."""
    try:
        last = json.loads((folder / "history.json").read_text())[-1]
        return {"epochs": last["epoch"], "module_accuracies": last["module_accuracies"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {"epochs": None, "module_accuracies": None}


class _Renormalise(nn.Module):
    """Images (N, 3, H, W) normalised as the one run's, to the same normalised as the other run's."""

    def __init__(self, given, wanted):
        super().__init__()
        (mean, std), (its_mean, its_std) = (
            [torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std")] for settings in (given, wanted)
        )
        self.same = given["mean"] == wanted["mean"] and given["std"] == wanted["std"]
        self.register_buffer("scale", std / its_std)
        self.register_buffer("offset", (mean - its_mean) / its_std)

    def forward(self, images):
        return images if self.same else images * self.scale + self.offset
