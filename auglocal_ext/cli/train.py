"""`auglocal train` and `auglocal resume`"""

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .. import __version__, data, models, report
from ..common.files import save_model, write_json
from ..common.memory import format_bytes
from ..optim import sgd
from ..rules.by_name import for_images
from ..training.divergence import TrainingDiverged
from ..training.loop import train
from ..training.result import TrainingInterrupted
from .checks import check_cut, check_image_size
from .errors import in_words_of_options
from .options import default_device

__all__ = ["resume_command", "train_command"]


def train_command(options):
    if options.name and Path(options.name).name != options.name:
        raise ValueError(f"--name must be a plain folder name, given {options.name!r}: choose the place with --runs")
    options.device = options.device or default_device()
    cuttable = check_cut(options)
    with _new_folder(options) as folder:
        return _train_in(folder, options, _read_data(options, cuttable))


def resume_command(options):
    """Goes on with a run, from its last whole epoch, by the settings that it was begun with."""
    folder = options.run_folder
    try:
        settings = json.loads((folder / "settings.json").read_text())["options"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} is no run of auglocal train, expected a folder with settings.json: give runs/NAME ({error})"
        ) from None
    settings |= {"runs": Path(settings["runs"]), "quiet": options.quiet}
    settings |= {name: vars(options)[name] for name in ("epochs", "device") if vars(options)[name] is not None}
    settings = argparse.Namespace(**settings)
    return _train_in(folder, settings, _read_data(settings, check_cut(settings)))


def _read_data(options, cuttable):
    torch.manual_seed(options.seed)
    reading = {"workers": options.workers, "download": options.download, "device": options.device}
    source = data.load(options.data, options.batch_size, progress=not options.quiet, **reading)
    check_image_size(cuttable, *source.description["image_size"], "--model, or larger images")
    return source


def _train_in(folder, options, source):
    """Trains on a Data, from the run's last whole epoch where there is one; leaves the files in the folder."""
    model, history = models.create(options.model, source.num_classes), []
    if (folder / "history.json").exists():
        history = json.loads((folder / "history.json").read_text())

    def save(entry):
        # After every epoch, so that no interruption costs more than one. One may be told again.
        history[entry["epoch"] - 1 :] = [entry]
        write_json(folder / "settings.json", _settings(options, source))
        write_json(folder / "history.json", history)
        save_model(folder / "model.pt", model)

    optimizer = partial(sgd(options.batch_size), lr=options.lr) if options.lr is not None else None
    started, status = time.perf_counter(), 0
    try:
        result = train(
            model,
            source.train,
            options.depth,
            val_loader=source.test,
            epochs=options.epochs,
            rule=for_images(options.rule, source.description["mean"], source.description["std"]),
            form=options.form,
            modules=options.modules,
            memory_budget=options.budget,
            recompute=options.recompute,
            optimizer=optimizer,
            precision=options.precision,
            device=options.device,
            seed=options.seed,
            progress=not options.quiet,
            on_epoch=save,
            checkpoint=folder / "checkpoint",
        )
    except (TrainingInterrupted, TrainingDiverged) as stop:
        if not history:
            raise
        result, status = stop.result, 130 if isinstance(stop, TrainingInterrupted) else 3
        print(f"\nauglocal: {in_words_of_options(stop)}", file=sys.stderr)
    title = f"{options.model} on {options.data.split(':')[0]}, rule {options.rule}"
    if result.plan.depth:
        title += f", depth {result.plan.depth}"
    if len(result.plan.modules) > 1:
        title += f", {len(result.plan.modules)} local modules"
    report.learning_curve(history, folder / "learning_curve.png", title)
    if status == 3:
        print(f"auglocal: the files of the {len(history)} epochs until then are in {folder}", file=sys.stderr)
        return status
    print(
        f"{title}: test accuracy {history[-1]['val_accuracy']:.2%} after {len(history)} epochs in "
        f"{time.perf_counter() - started:.1f} s, peak memory {format_bytes(result.peak_bytes)}\n"
        f"saved to {folder}: model.pt (a plain state_dict), settings.json, history.json, learning_curve.png; "
        f"`auglocal resume {folder} --epochs N` goes on"
    )
    return status


def _settings(options, source):
    """What is needed to use model.pt: the options, the versions, the classes and the images' normalisation."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    given.pop("run", None)
    versions = {"torch": torch.__version__, "auglocal_ext": __version__}
    return {"options": given, "versions": versions, **source.description, "num_classes": source.num_classes}


@contextlib.contextmanager
def _new_folder(options):
    """Makes the run's folder, before anything is read; a run that did not get to a first result leaves nothing."""
    name = options.name
    if not name:
        cut = f"d{options.depth}" if options.rule == "auglocal" else options.rule
        cut += f"-K{options.modules}" if options.modules else ""
        name = f"{options.model}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.runs / name
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True)
    except FileExistsError as error:
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another --name") from None
        raise _no_folder(folder, error) from None
    except OSError as error:
        raise _no_folder(folder, error) from None
    try:
        yield folder
    finally:
        if not (folder / "history.json").exists():
            (folder / "settings.json").unlink(missing_ok=True)
            for path in (folder / "checkpoint", *created):
                with contextlib.suppress(OSError):  # another run's folder lies in it by now
                    path.rmdir()


def _no_folder(folder, error):
    return OSError(f"{folder} cannot be made: {error.strerror}: {error.filename}; choose another --runs")
