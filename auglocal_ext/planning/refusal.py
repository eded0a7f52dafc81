"""What is said of a budget that nothing fits: the least that would, the largest batch that does, what else would."""

from ..common.memory import format_bytes
from .cut_table import between

__all__ = ["too_small"]


def too_small(menu, budget):
    """The error of a budget that nothing fits. menu: `Menu`."""
    smallest, state = menu.asked.least(menu.table(menu.asked)), menu.planner.state_bytes()
    fits = _largest_batch(menu, budget) if budget > state else 0
    remedy = f"give at least that, or batches of {fits}"
    if not fits:
        remedy = "give at least that, and no batch of two images fits it"
    if budget <= state:
        more = ", with what accumulate and ema keep," if menu.planner.stepping.keeps_more else ""
        remedy = f"the model's parameters and optimizer state alone{more} are {format_bytes(state)}"
    return ValueError(
        f"memory_budget {format_bytes(budget)} is too small for batches of {menu.shape[0]}: the smallest step of this "
        f"model needs {format_bytes(smallest)} ({smallest:,} bytes); {remedy}"
        f"{_otherwise(menu, budget, smallest)}"
    )


def _otherwise(menu, budget, smallest):
    """What needs less, kind by kind, with a batch that would fit; as a sentence."""
    tables = {kind: menu.table(kind) for kind in menu.others}
    least = {kind: kind.least(table) for kind, table in tables.items()}
    said = []
    for kind in sorted(least, key=least.get):
        if least[kind] < smallest:
            said.append(f"with {kind.words} needs {format_bytes(least[kind])}{_fits(menu, kind, tables[kind], budget)}")
    return f". The smallest step {'; '.join(said)}" if said else ""


def _fits(menu, kind, table, budget):
    """The batch of a Kind that fits, about: by a table between those of this batch and of two images."""

    def fit(table):
        return kind.least(table) <= budget

    if fit(table):
        return ", which fits"
    if menu.shape[0] <= 2 or not fit(few := menu.table(kind, (2, *menu.shape[1:]))):
        return ""
    return f" (batches of about {_guess(table, few, menu.shape[0], 2, fit)})"


def _largest_batch(menu, budget):
    """The largest batch below the menu's of which some cut that was asked for fits the budget; 0: none of two images.

    Tables are nearly affine in the batch. So a batch is guessed by tables between those of the nearest batches that are
    known, then walked: what is returned, and that one more does not fit, was walked.
    """
    fits, beyond = 2, menu.shape[0]
    known = {beyond: menu.table(menu.asked)}

    def fit(table):
        return menu.asked.least(table) <= budget

    def walked(batch):
        known[batch] = menu.table(menu.asked, (batch, *menu.shape[1:]))
        return fit(known[batch])

    if beyond <= 2 or not walked(2):
        return 0
    while beyond - fits > 1:
        guess = max(_guess(known[beyond], known[fits], beyond, fits, fit), fits + 1)
        if walked(guess):
            fits = guess
        else:
            beyond = guess
    return fits


def _guess(larger, smaller, beyond, fits, fit):
    """The largest batch below `beyond`, from `fits` on, whose table, between those of the two, is fit."""
    low, high, guess = fits + 1, beyond - 1, fits
    while low <= high:
        batch = (low + high) // 2
        if fit(between(smaller, larger, batch - fits, beyond - fits)):
            guess, low = batch, batch + 1
        else:
            high = batch - 1
    return guess
