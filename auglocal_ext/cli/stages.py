"""`auglocal train --stages N`: a run whose model is spread over processes."""

import sys
import time

from .. import report
from ..common.files import save_model
from ..common.memory import format_bytes
from ..distributed.group import world
from ..training.divergence import TrainingDiverged
from ..training.evaluate import evaluation
from .errors import in_words_of_options
from .job import load_data, train_stages_as_told
from .parts import part_of
from .run_files import going_on, how_it_ended, tell_what_is_left, title_of, what_goes_on, write_epoch

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
    title, tested = title_of(options, result.plan), _tested(options, model, source)
    report.learning_curve(history, folder / "learning_curve.png", title)
    print(
        f"{title}: {how_it_ended(options, history, tested, result.stopped)} in {time.perf_counter() - started:.1f} s\n"
        f"a step's peak memory on each rank, planned: {', '.join(map(format_bytes, result.rank_bytes))}\n"
        f"saved to {folder}: model.pt (a plain state_dict), settings.json, history.json, history.csv, "
        f"learning_curve.png; {what_goes_on(folder, result.stopped)}"
    )
    return 0


def _tested(options, model, source):
    """The Evaluation of rank 0, which has the whole model now, on all test images, where others were validated on, or
    None."""
    if not options.val_split:
        return None
    _, parts = part_of(options)
    whole = source if parts == 1 else load_data(options, options.data)
    return evaluation(model, whole.test, precision=options.precision, progress=not options.quiet)
