"""What every command line here shares: options that are numbers, errors in the words of the options, exit statuses.

2: a mistake of the user's, told in one sentence; 3: the training diverged; 130: interrupted; a bug: 1 and a traceback.
"""

import argparse
import dis
import inspect
import math
import re
import sys
from pathlib import Path

import torch

from . import models
from ._device import usable_device
from .backbone import as_backbone
from .budget import candidates, parse_bytes
from .loop import TrainingDiverged
from .rules import RULES, as_rule, cut

__all__ = [
    "Parser",
    "check_cut",
    "check_image_size",
    "device",
    "in_words_of_options",
    "number",
    "run",
    "seed",
    "size",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # What argparse takes for a value and not for an option: -5GB and -inf are values too.
        self._negative_number_matcher = re.compile(r"^-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message):
        message = re.sub(r"^argument (\S+): (must |'|\d)", r"\1 \2", message)  # of the kinds of values below
        self.exit(2, f"{self.prog.split()[0]}: error: {message}\n")


# ---- kinds of values: argparse's `type` ---------------------------------------------------------------------------


def whole(least, most=10**6, expected=None, words=()):
    """A whole number from `least` to `most`; expected: the range in words; words: which are taken too."""
    also = "".join(f" or {word}" for word in words)

    def read(text):
        if text in words:
            return text
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number{also}, given {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {expected or f'at least {least}{also}'}, given {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, given {value}")
        return value

    return read


def number(least=None, above=None):
    """A finite number of at least `least`, or above `above`."""
    expected = f"above {above}" if least is None else f"at least {least}"

    def read(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, given {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, {expected}, given {value}")
        if not (value >= least if above is None else value > above):
            raise argparse.ArgumentTypeError(f"must be {expected}, given {value}")
        return value

    return read


def seed(text):
    """What torch.manual_seed takes."""
    return whole(-(2**63), 2**64 - 1)(text)


def size(text):
    """Bytes, as 6GB; stays text."""
    try:
        parse_bytes(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a size such as '6GB', '500 MB' or '4GiB', given {text!r}") from None
    return text


def device(text):
    """The name of a device that can be trained on."""
    try:
        usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device ")) from None
    return text


# ---- what is checked before anything is read or planned --------------------------------------------------------


def check_cut(options):
    """The options' model, on the meta device; ValueError unless it is one that can be cut as the options say."""
    given = vars(options)
    name, classes = options.model, given.get("num_classes") or 10
    try:
        with torch.device("meta"):
            model = models.create(name, classes)
    except NotImplementedError:  # its constructor looks at values
        model = models.create(name, classes).to("meta")
    backbone, budget = as_backbone(model), given.get("budget")
    if options.depth == "auto" and budget is None:
        raise ValueError(
            "depth='auto' chooses under a budget: give memory_budget too, for instance memory_budget='6GB'"
        )
    rule = RULES[options.rule], options.depth, given.get("form")
    rules = [as_rule(*rule)] if budget is None else candidates(*rule, len(backbone.units))
    cut(backbone, rules[0], options.modules)
    return model


def check_image_size(model, height, width, option):
    """ValueError unless images of that size go through the model, which is on the meta device; option: to change."""
    try:
        with torch.no_grad():
            model.eval()(torch.empty(2, 3, height, width, device="meta"))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"images of {height}x{width} pixels do not go through this model: choose another {option} ({reason})"
        ) from None


# ---- errors and exit statuses -------------------------------------------------------------------------------------


def run(program, command, lost=""):
    """Runs a command, and tells in one sentence what its user can have caused.

    Args:
        program: its name.
        command: () -> exit status.
        lost: what an interruption or a divergence costs, ": no record" for instance.

    Returns:
        The exit status. A bug is raised.
    """
    try:
        return command()
    except SystemExit as stopped:  # argparse has said why
        return stopped.code
    except KeyboardInterrupt as stopped:
        print(f"\n{program}: {str(stopped) or 'interrupted'}{lost}", file=sys.stderr)
        return 130
    except TrainingDiverged as error:
        print(f"{program}: {in_words_of_options(error)}{lost}", file=sys.stderr)
        return 3
    except Exception as error:
        if not _of_the_user(error, command):
            raise
        print(f"{program}: error: {in_words_of_options(error)}", file=sys.stderr)
        return 2


# What the library calls what an option sets, and what the option is called.
_WORDS = [
    (r", for instance optimizer=functools\.partial\(.*\)$", " with --lr"),
    (r"\bmemory_budget='([^']*)'", r"--budget \1"),
    (r"\bmemory_budget\b", "--budget"),
    (r"\b(depth|form|modules|rule)='([^']*)'", r"--\1 \2"),
    (r"^(data|depth|form|modules|epochs|workers|device|seed) ", r"--\1 "),
    (r"\b(leave|give) (modules|form)\b", r"\1 --\2"),
    (r"\bbatch_size\b", "--batch-size"),
    (r"\bauglocal_ext\.plan\b", "auglocal plan"),
]


def in_words_of_options(error):
    """An error's message in one line, as who typed the options knows things."""
    message = " ".join(str(error).split("\n")) or type(error).__name__
    for pattern, option in _WORDS:
        message = re.sub(pattern, option, message)
    return message


def _of_the_user(error, command):
    """Whether an error is one of the user's machine, files or arguments, and no bug.

    Of ValueError and TypeError, which bugs raise too, those are that a `raise` of this package or of the program has
    made: a sentence of ours. What torch or an operation on wrong values raises is none.
    """
    if isinstance(error, (OSError, ImportError, MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's, on the CPU
        return True
    if not isinstance(error, (ValueError, TypeError)):
        return False
    if type(error).__module__.startswith(f"{__package__}."):  # raised again from a DataLoader's worker
        return True
    at = error.__traceback__
    while at.tb_next:
        at = at.tb_next
    code = at.tb_frame.f_code
    ours = {Path(__file__).parent, Path(inspect.getfile(inspect.unwrap(command))).resolve().parent}
    raised = code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and any(Path(code.co_filename).resolve().is_relative_to(folder) for folder in ours)
