"""`auglocal train` and `auglocal resume`"""

import sys
import threading
import time
from pathlib import Path

from .. import report
from ..common.files import save_model, write_json
from ..common.messages import plural
from ..distributed.group import world
from ..training.divergence import TrainingDiverged
from ..training.evaluate import Validation, evaluated
from ..training.lines import cost_lines
from ..training.result import TrainingInterrupted
from .errors import in_words_of_options
from .events import event_writer
from .job import check, make_model, read_data, train_as_told
from .names import FREE
from .options import default_device
from .ranks import folder_of_run, joined_ranks
from .run_files import going_on, how_it_ended, tell_what_is_left, title_of, what_goes_on, write_epoch
from .runs import can_go_on, history_of, options_of, read_settings, settings_of
from .stages import train_in_parts
from .training_options import add_run, settled, told

__all__ = ["resume_command", "train_command"]


def train_command(given):
    given = vars(given)
    with joined_ranks():
        return _resume(given.pop("resume"), given) if "resume" in given else _train(given)


def resume_command(given):
    given = vars(given)
    with joined_ranks():
        return _resume(given.pop("run_folder"), given)


def _train(given):
    options = settled(given, add_run)
    if options.name and Path(options.name).name != options.name:
        raise ValueError(f"--name must be a plain folder name, given {options.name!r}: choose the place with --runs")
    options.quiet = options.quiet or not world().first
    write_events = event_writer() if options.tensorboard else None
    cuttable = check(options, options.weights)
    with folder_of_run(options) as folder:
        source = read_data(options, cuttable)
        model = make_model(options, source, options.weights)
        if not options.quiet:
            print(told(options))
        if world().first:  # a stop in the first epoch is gone on from
            write_json(folder / "settings.json", settings_of(options, source))
        return _train_in(folder, options, source, model, write_events, history=[])


def _resume(folder, given):
    """Goes on with a run, from its last checkpoint, by the settings that it was begun with."""
    options = options_of(folder, read_settings(folder), leave_out=given.keys() & {"device"})
    options.quiet = not world().first
    for name, value in given.items():
        before = getattr(options, name, None)
        free = name in FREE or (name == "stages" and before is not None)  # any number goes on from its checkpoint
        if not free and value != before:
            raise ValueError(
                f"--{name.replace('_', '-')} is {_shown(before)} in this run, given {_shown(value)}: leave it out, or "
                f"begin a new run"
            )
        setattr(options, name, value)
    goes_on, history = can_go_on(folder), history_of(folder)
    if not goes_on and (folder / "history.json").exists():
        raise ValueError(
            f"{folder} has no checkpoint to go on from, expected {folder / 'checkpoint' / 'last.pt'}: begin a new run"
        )
    if options.epochs < len(history):
        raise ValueError(
            f"{folder} has a training of {plural(len(history), 'epoch')} already, given --epochs {options.epochs}: "
            f"give more"
        )
    options.device = options.device or default_device()
    write_events = event_writer() if options.tensorboard else None
    weights = None if goes_on else options.weights  # which are in the checkpoint
    source = read_data(options, check(options, weights))
    if not options.quiet:
        print(told(options))
    return _train_in(folder, options, source, make_model(options, source, weights), write_events, history)


def _shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(value)
    return "not set" if value is None else value


def _train_in(folder, options, source, model, write_events, history):
    """Trains on a Data, from the run's last checkpoint where there is one; leaves the files in the folder. history: of
    that checkpoint."""
    if options.stages is not None:
        return train_in_parts(folder, options, source, model, write_events, history)

    def save(entry):
        history[entry["epoch"] - 1 :] = [entry]  # which may be told again
        if world().first:
            save_model(folder / "model.pt", model)
            write_epoch(folder, options, source, history, write_events)

    keeping = {"checkpoint": folder / "checkpoint", "checkpoint_minutes": options.checkpoint_minutes}
    started, status = time.perf_counter(), 0
    try:
        with going_on(folder):
            result = train_as_told(options, model, source, on_epoch=save, **keeping)
    except BaseException as stop:
        if not history or not isinstance(stop, TrainingInterrupted | TrainingDiverged):
            raise
        result, status = stop.result, 130 if isinstance(stop, TrainingInterrupted) else 3
        if world().first:
            print(f"\nauglocal: {in_words_of_options(stop)}", file=sys.stderr)
    tested = _tested(options, model, source, result) if history and status != 3 else None
    if not world().first:
        return status
    if history and not (folder / "model.pt").exists():  # lost, of a run that had ended
        save_model(folder / "model.pt", model)
    if not history:
        print(f"stopped in the first epoch by --max-seconds: `auglocal resume {folder}` goes on")
        return status
    if result.ema_model is not None:
        save_model(folder / "model_ema.pt", result.ema_model)
    title = title_of(options, result.plan)
    report.learning_curve(history, folder / "learning_curve.png", title)
    if status == 3:
        tell_what_is_left(history, folder)
        return status
    averaged = "" if result.ema_model is None else "model_ema.pt, of the averaged weights, "
    print(
        f"{title}: {how_it_ended(options, history, tested, result.stopped)} in {time.perf_counter() - started:.1f} s\n"
        f"{cost_lines(result)}\n"
        f"saved to {folder}: model.pt (a plain state_dict), {averaged}settings.json, history.json, history.csv, "
        f"learning_curve.png; {what_goes_on(folder, result.stopped)}"
    )
    return status


def _tested(options, model, source, result):
    """The Evaluation on the test images, all ranks' together, where others were validated on, or None."""
    if not options.val_split or result.stopped == "max_seconds":  # the model may be further than the history
        return None
    validation = Validation(model, options.precision, classes=source.num_classes)
    return evaluated(validation, source.test, False, threading.Event(), of_all_ranks=True)
