"""Options of the command lines here: numbers, sizes, devices, and errors of one line.

What needs torch is imported where it is called: no `--help` waits for it.
"""

import argparse
import math
import re

__all__ = ["Parser", "default_device", "device", "duration", "number", "rate", "seed", "size", "whole"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; where: what they are in, "FILE: " for instance."""

    def __init__(self, *arguments, where="", **options):
        super().__init__(*arguments, **options)
        self.where = where
        # What argparse takes for a value and not for an option: -5GB and -inf are values too.
        self._negative_number_matcher = re.compile(r"^-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message):
        # Of the kinds of values below; an option that has another name is called by its first one.
        message = re.sub(r"^argument ([^\s/]+)\S*: (must |'|\d)", r"\1 \2", message)
        self.exit(2, f"{self.prog.split()[0]}: error: {self.where}{message}\n")


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


def number(least=None, above=None, below=None):
    """A finite number of at least `least`, or above `above`, and below `below`."""
    expected = f"above {above}" if least is None else f"at least {least}"
    if below is not None:
        expected += f" and below {below}"

    def read(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, given {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, {expected}, given {value}")
        enough = value >= least if above is None else value > above
        if not enough or (below is not None and value >= below):
            raise argparse.ArgumentTypeError(f"must be {expected}, given {value}")
        return value

    return read


def seed(text):
    """What torch.manual_seed takes."""
    return whole(-(2**63), 2**64 - 1)(text)


def size(text):
    """Bytes, as 6GB; stays text."""
    from ..common.memory import parse_bytes

    try:
        parse_bytes(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a size such as '6GB', '500 MB' or '4GiB', given {text!r}") from None
    return text


def rate(text):
    """A number a second: 25GB/s, 60T, 1e9."""
    return _scaled(text, {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}, r"b?(?:/s)?", "a rate such as 25GB/s or 60T")


def duration(text):
    """Seconds, of 5us, 2 ms or 1s."""
    return _scaled(text, {"n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1}, "s", "a time such as 5us or 2ms")


def _scaled(text, prefixes, unit, expected):
    """A number above 0 with a prefix and a unit, which is a pattern."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ]?)" + unit + r"\s*", text.lower())
    try:
        value = float(found[1]) * prefixes[found[2]]
    except (TypeError, ValueError, KeyError):
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be {expected}, given {text!r}")
    return value


def device(text):
    """The name of a device that can be trained on."""
    from ..common.device import usable_device

    try:
        usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device ")) from None
    return text


def default_device():
    """The name of the device where none is given."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
