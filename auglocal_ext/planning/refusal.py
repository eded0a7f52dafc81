"""What is said of a budget that nothing fits: the least that would, and the largest batch that does."""

from ..common.memory import format_bytes
from . import search
from .cut_table import between
from .walker import cut_tables

__all__ = ["too_small"]


def too_small(planner, shape, budget, rules, wanted, tables):
    """The error of a budget that nothing fits: what the least is, and which batch would fit. tables: at this batch."""
    smallest = _least(tables, wanted)
    batch = _largest_batch(planner, shape, budget, rules, wanted, tables)
    remedy = f"or batches of {batch}" if batch else "and no batch of two images fits it"
    state = planner.state_bytes()
    if budget <= state:
        remedy = f"the model's parameters and optimizer state alone are {format_bytes(state)}"
    return ValueError(
        f"memory_budget {format_bytes(budget)} is too small for batches of {shape[0]}: the smallest step of this model "
        f"needs {format_bytes(smallest)} ({smallest:,} bytes); give at least that, {remedy}"
    )


def _largest_batch(planner, shape, budget, rules, wanted, tables):
    """The largest batch below shape[0] of which some cut fits the budget; 0: none of two images does.

    Tables are nearly affine in the batch. So a batch is guessed by tables between those of the nearest batches that are
    known, then walked: what is returned, and that one more does not fit, was walked.
    """
    fits, known = 2, {shape[0]: tables}

    def walked(batch):
        known[batch] = cut_tables(planner, (batch, *shape[1:]), rules)
        return _least(known[batch], wanted) <= budget

    beyond = shape[0]
    if beyond <= 2 or budget <= planner.state_bytes() or not walked(2):
        return 0
    while beyond - fits > 1:
        guess = fits
        low, high = fits + 1, beyond - 1  # batches that it may be
        while low <= high:
            batch = (low + high) // 2
            guessed = [
                between(ours, theirs, batch - fits, beyond - fits)
                for ours, theirs in zip(known[fits], known[beyond], strict=True)
            ]
            if _least(guessed, wanted) <= budget:
                guess, low = batch, batch + 1
            else:
                high = batch - 1
        guess = max(guess, fits + 1)
        if walked(guess):
            fits = guess
        else:
            beyond = guess
    return fits


def _least(tables, wanted):
    return min(search.smallest(search.front(table), wanted).bytes for table in tables)
