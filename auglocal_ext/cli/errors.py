"""Errors in the words of the options, and exit statuses.

2: a mistake of the user's, or another rank that stopped, told in one sentence; 3: the training diverged; 130:
interrupted; a bug: 1 and a traceback.
"""

import dis
import inspect
import re
import sys
import warnings
from pathlib import Path

from ..common.messages import first_line

__all__ = ["in_words_of_options", "run"]


def run(program, command, lost=""):
    """Runs a command, and tells in one sentence what its user can have caused.

    Args:
        program: its name.
        command: () -> exit status.
        lost: what an interruption or a divergence costs, ": no record" for instance.

    Returns:
        The exit status. A bug is raised.
    """
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{program}: warning: {message}\n"
    try:
        return command()
    except SystemExit as stopped:  # argparse has said why
        return stopped.code
    except KeyboardInterrupt as stopped:
        print(f"\n{program}: {in_words_of_options(stopped) if str(stopped) else 'interrupted'}{lost}", file=sys.stderr)
        return 130
    except Exception as error:
        if any(_is(error, f"{_PACKAGE.name}.training.divergence", name) for name in ("TrainingDiverged", "NotFinite")):
            print(f"{program}: {in_words_of_options(error)}{lost}", file=sys.stderr)
            return 3
        if not _of_the_user(error, command):
            raise
        print(f"{program}: error: {in_words_of_options(error)}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = before


_PACKAGE = Path(__file__).resolve().parents[1]

# What the library calls what an option sets, and what the option is called.
_WORDS = [
    (r", for instance optimizer=functools\.partial\(.*\), and another checkpoint folder$", " with --lr, in a new run"),
    (r", for instance optimizer=functools\.partial\(.*\)$", " with --lr"),
    (r"\bgiven epochs=(\d+): give more, or another folder", r"given --epochs \1: give more"),
    (r"\bgive the same optimizer=, or another folder", "begin a new run"),
    (r"\bchoose another checkpoint\b", "choose another --runs"),
    (r"\bmemory_budget='([^']*)'", r"--budget \1"),
    (r"\bmemory_budget\b", "--budget"),
    (r"\b(depth|form|auxiliary|recompute|prefer|modules|rule|clip)='([^']*)'", r"--\1 \2"),
    (r"\bsync_batch_norm(=True)?", "--sync-bn"),
    (r"\bclip_norm(=?)", lambda found: "--clip-grad-norm" + " " * len(found[1])),
    (r"\baccumulate=(\d)", r"--accumulate \1"),
    (r"\bleave clip at\b", "leave --clip at"),
    (r"^units\b|\bunits=", "--units"),
    (r", an auglocal_ext\.rules\.Auxiliary, or a function of a border that makes a net, given", ", given"),
    (r"^an auxiliary net's", "--auxiliary: an auxiliary net's"),
    (r"^readout=shared needs", "--auxiliary readout=shared needs"),
    (r"^(data|depth|form|auxiliary|modules|epochs|workers|device|seed|patience|stages) ", r"--\1 "),
    (r"^ema=\S+ needs", "--model-ema needs"),
    (r"^(max|val|image|label|checkpoint)_(seconds|split|size|smoothing|minutes) ", r"--\1-\2 "),
    (r"\b(leave|give) (modules|form)\b", r"\1 --\2"),
    (r"\bbatch_size\b", "--batch-size"),
    (r"\bgive image_size\b", "give --image-size"),
    (r"\bauglocal_ext\.plan\b", "auglocal plan"),
]

# RuntimeErrors of torch's that the machine is to blame for, and what they mean.
_MACHINE = [
    (r"can't allocate memory", "out of memory: give a smaller --batch-size, or a --budget"),
    (r"CUDA error: out of memory", "out of memory on the GPU: give a smaller --batch-size, or a --budget"),
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)",
        "a process that reads images was ended from outside, as where memory runs out: give fewer --workers",
    ),
    (r"(shared memory|/torch_\d+)", "no shared memory is left for processes that read images: give fewer --workers"),
]


def in_words_of_options(error):
    """An error's message in one line, as who typed the options knows things, and its `remedy` if it has one."""
    message = " ".join(str(error).split("\n")) or type(error).__name__
    for pattern, sentence in _MACHINE:
        if isinstance(error, RuntimeError) and re.search(pattern, message):
            message = f"{sentence} ({first_line(error).strip(' .')})"
    for pattern, option in _WORDS:
        message = re.sub(pattern, option, message)
    remedy = getattr(error, "remedy", None)
    return f"{message}; {remedy}" if remedy else message


def _is(error, module, name):
    """isinstance for a class of a module that may not have been imported: then there is no such error."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _of_the_user(error, command):
    """Whether an error is one of the user's machine, files or arguments, and no bug.

    Of ValueError and TypeError, which bugs raise too, those are that a `raise` of this package or of the program has
    made: a sentence of ours. What torch or an operation on wrong values raises is none.
    """
    if isinstance(error, (OSError, ImportError, MemoryError)) or _is(error, "torch", "OutOfMemoryError"):
        return True
    if _is(error, f"{_PACKAGE.name}.distributed.faults", "RankFailed"):
        return True
    if isinstance(error, RuntimeError) and any(re.search(pattern, str(error)) for pattern, _ in _MACHINE):
        return True
    if not isinstance(error, (ValueError, TypeError)):
        return False
    if type(error).__module__.startswith(f"{_PACKAGE.name}."):  # raised again from a DataLoader's worker
        return True
    at = error.__traceback__
    while at.tb_next:
        at = at.tb_next
    code = at.tb_frame.f_code
    ours = {_PACKAGE, Path(inspect.getfile(inspect.unwrap(command))).resolve().parent}
    raised = code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and any(Path(code.co_filename).resolve().is_relative_to(folder) for folder in ours)
