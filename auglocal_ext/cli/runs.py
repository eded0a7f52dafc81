"""The folder of a run: making it, and what its settings.json says."""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch

from .. import __version__
from .config import checked
from .presets import DEFAULTS
from .training_options import add_run

__all__ = ["can_go_on", "history_of", "new_folder", "options_of", "read_settings", "settings_of"]


def settings_of(options, source):
    """What is needed to use model.pt: the options, the versions, the classes and the images' normalisation."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    versions = {"torch": torch.__version__, "auglocal_ext": __version__}
    return {"options": given, "versions": versions, **source.description, "num_classes": source.num_classes}


def read_settings(folder):
    """What `settings_of` gave the run in a folder; ValueError where there is none."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
        whole = isinstance(settings["options"]["model"], str) and type(settings["num_classes"]) is int
        if not whole or not len(settings["mean"]) == len(settings["std"]):
            raise ValueError("it has no model, num_classes, mean and std of a training")
        return settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no run of auglocal train, expected a folder with settings.json: give runs/NAME ({error})"
        ) from None


def options_of(folder, settings, leave_out=()):
    """A run's options, as a Namespace; leave_out: names of those that stay at their defaults."""
    saved = {name: value for name, value in settings["options"].items() if name not in leave_out}
    found = checked(saved, add_run, f"{folder / 'settings.json'}: ", leave_out_others=True)
    return argparse.Namespace(**DEFAULTS | found)


@contextlib.contextmanager
def new_folder(options):
    """Makes the run's folder, before anything is read; a run that left nothing to go on from leaves nothing."""
    name = options.name
    if not name:
        cut = f"d{options.depth}" if options.rule == "auglocal" else options.rule
        cut += f"-K{options.modules}" if options.modules else ""
        name = f"{options.model.replace(':', '-')}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
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
        if not (folder / "history.json").exists() and not can_go_on(folder):
            (folder / "settings.json").unlink(missing_ok=True)
            for path in (folder / "checkpoint", *created):
                with contextlib.suppress(OSError):  # another run's folder lies in it by now
                    path.rmdir()


def can_go_on(folder):
    """Whether `auglocal resume` finds a checkpoint there."""
    return (folder / "checkpoint" / "last.pt").is_file() or _of_stages(folder) is not None


def history_of(folder):
    """The whole epochs of a run's checkpoint, whatever history.json says; of one that cannot be read none, which the
    training then tells."""
    try:
        path = folder / "checkpoint" / "last.pt"
        if not path.exists() and (of_stages := _of_stages(folder)) is not None:
            from ..stages.checkpoint import more_of

            return more_of(of_stages)["history"]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["history"]
    except Exception:
        return []


def _of_stages(folder):
    """The last checkpoint of a training with --stages, or None."""
    from ..stages.checkpoint import newest  # here, as torch takes half a second to import what that needs

    return newest(folder / "checkpoint")


def _no_folder(folder, error):
    return OSError(f"{folder} cannot be made: {error.strerror}: {error.filename}; choose another --runs")
