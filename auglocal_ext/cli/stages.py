"""`auglocal train --stages N`: a run whose model is spread over processes."""

import sys
import time

from .. import report
from ..common.files import save_model
from ..common.memory import format_bytes
from ..common.messages import plural
from ..distributed.group import world
from ..training.divergence import TrainingDiverged
from .errors import in_words_of_options
from .job import train_stages_as_told
from .run_files import going_on, tell_what_is_left, title_of, write_epoch

__all__ = ["train_in_parts"]


def train_in_parts(folder, options, source, model, write_events, history):
    """As `train` does a run of one process; but model.pt is written at the end, when rank 0 has all of it.

    Returns:
        The exit status.
    """

    def save(entry):
        history[entry["epoch"] - 1 :] = [entry]
        if world().first:
            write_epoch(folder, options, source, history, write_events)

    started = time.perf_counter()
    try:
        with going_on(folder):
            result = train_stages_as_told(options, model, source, on_epoch=save, checkpoint=folder / "checkpoint")
    except TrainingDiverged as stop:
        if not history:
            raise
        if world().first:
            print(f"\nauglocal: {in_words_of_options(stop)}", file=sys.stderr)
            tell_what_is_left(history, folder)
        return 3
    if not world().first:
        return 0
    save_model(folder / "model.pt", model)
    title = title_of(options, result.plan)
    report.learning_curve(history, folder / "learning_curve.png", title)
    print(
        f"{title}: test accuracy {history[-1]['val_accuracy']:.2%} after {plural(len(history), 'epoch')} in "
        f"{time.perf_counter() - started:.1f} s\n"
        f"a step's peak memory on each rank, planned: {', '.join(map(format_bytes, result.rank_bytes))}\n"
        f"saved to {folder}: model.pt (a plain state_dict), settings.json, history.json, history.csv, "
        f"learning_curve.png; `auglocal resume {folder} --epochs N` goes on"
    )
    return 0
