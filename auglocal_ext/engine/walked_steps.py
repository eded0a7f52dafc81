"""Runs steps without data, equal ones once: a module's program is walked for what it keeps and again with more kept, in
the cut that was asked for and in those that it is compared with, and what its steps make is the same each time."""

import contextlib
from functools import partial

import torch

from ..common.memory import MultiplyAccumulates
from .answers import form, forms_of, is_plain, made_again
from .as_real import RealLayouts

__all__ = ["WalkedSteps"]


class WalkedSteps:
    """What steps did, for as long as the modules that they run stay as they are."""

    def __init__(self):
        self._known, self._layouts = {}, RealLayouts()

    def run(self, step, reads, counted):
        """Runs a step.

        Args:
            step: a `Step`.
            reads: the values that it reads, on the meta device.
            counted: `LiveBytes`, not yet entered, of what lives.

        Returns:
            (its writes, a tuple; bytes that it needs beyond what lives, its writes included; its multiply-accumulates)
        """
        question, given = _question(step, reads), [x for x in reads if isinstance(x, torch.Tensor)]
        if question in self._known:
            forms, scratch, macs = self._known[question]
            made = tuple([made_again(one, given) for one in forms])
            for value in made:
                if isinstance(value, torch.Tensor):
                    counted.count(value)
            return made, scratch, macs
        start = counted.peak = counted.now
        with counted, self._layouts, MultiplyAccumulates() if step.macs is None else contextlib.nullcontext() as called:
            made = step.run(*reads)
        made = (made,) if len(step.writes) == 1 else tuple(made)
        scratch = counted.peak - start
        macs = called.count if step.macs is None else step.macs(reads, made)
        if question is not None and question == _question(step, reads):
            forms = forms_of(made, given)
            if forms is not None and counted.now - start == _new_bytes(made, forms):  # it leaves nothing else
                self._known[question] = forms, scratch, macs
        return made, scratch, macs


def _new_bytes(made, forms):
    return sum(value.nbytes for value, (place, _) in zip(made, forms, strict=True) if place is None)


def _question(step, reads):
    """What a step's doings depend on; None: on more than can be told, such as a graph of autograd's."""
    given = [form(x) if isinstance(x, torch.Tensor) else ("plain", x) if is_plain(x) else None for x in reads]
    if None in given:
        return None
    question = _parts(step.run), len(step.writes), *given
    try:
        hash(question)
    except TypeError:
        return None
    return question


def _parts(run):
    """A step's function as something that equals another one's that does the same to the same modules."""
    if isinstance(run, partial):
        return (
            _parts(run.func),
            *map(_parts, run.args),
            *((name, _parts(given)) for name, given in run.keywords.items()),
        )
    if isinstance(run, tuple | list):
        return tuple(map(_parts, run))
    return type(run), run
