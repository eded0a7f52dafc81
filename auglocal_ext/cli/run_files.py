"""What a training leaves in its run's folder while it goes on, and what is said where it stops."""

import contextlib
import signal
import sys
import threading

from ..common.files import write_json, write_text
from ..common.messages import plural
from .events import as_csv
from .runs import can_go_on, settings_of

__all__ = ["going_on", "how_it_ended", "tell_what_is_left", "title_of", "what_goes_on", "write_epoch"]


def write_epoch(folder, options, source, history, write_events):
    """After every epoch, so that no interruption costs more than one."""
    write_json(folder / "settings.json", settings_of(options, source))
    write_json(folder / "history.json", history)
    write_text(folder / "history.csv", as_csv(history))
    if write_events:
        write_events(folder / "tensorboard", history[-1])


def tell_what_is_left(history, folder):
    """Where the files are of a training that diverged."""
    print(f"auglocal: the files of the {plural(len(history), 'epoch')} until then are in {folder}", file=sys.stderr)


def title_of(options, plan):
    """What was trained, in a few words."""
    title = f"{options.model} on {options.data.split(':')[0]}, rule {plan.rule}"
    if plan.depth:
        title += f", depth {plan.depth}"
    if len(plan.modules) > 1:
        title += f", {len(plan.modules)} local modules"
    return title


def how_it_ended(options, history, tested, stopped):
    """The accuracy, after how many epochs, and what stopped it.

    Args:
        tested: the Evaluation on the test images, where others were validated on, or None.
        stopped: see `auglocal_ext.TrainResult`.
    """
    accuracy = f"{'validation' if options.val_split else 'test'} accuracy {history[-1]['val_accuracy']:.2%}"
    if tested is not None:
        accuracy += f", test accuracy {tested.top1:.2%}"
    why = f", stopped by --{stopped.replace('_', '-')}," if stopped else ""
    return f"{accuracy} after {plural(len(history), 'epoch')}{why}"


def what_goes_on(folder, stopped):
    """The command that goes on with a run."""
    return f"`auglocal resume {folder} {'--patience N' if stopped == 'patience' else '--epochs N'}` goes on"


@contextlib.contextmanager
def going_on(folder):
    """Within, SIGTERM does what Ctrl-C does, and what stops a training that can be gone on from says how."""
    try:
        with _terminated_as_interrupted():
            yield
    except BaseException as stop:
        if can_go_on(folder) and isinstance(stop, KeyboardInterrupt | OSError | MemoryError | RuntimeError):
            stop.remedy = f"go on with `auglocal resume {folder}`"
        raise


@contextlib.contextmanager
def _terminated_as_interrupted():
    """Within, SIGTERM does what Ctrl-C does: it leaves a checkpoint of the last step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
