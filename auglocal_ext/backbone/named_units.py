"""Units as a user names them: each begins where a module begins, and reaches to where the next one does."""

from collections.abc import Iterable

__all__ = ["grouped_by_names"]


def grouped_by_names(pieces, names, known, model):
    """The pieces of each named unit, the first one's beginning with the images.

    Args:
        pieces: those of all units, see `cutter`.
        names: of modules by their paths in the model, or of units by their names, in order.
        known: {name of a unit: index of its first piece}, of the model as it is read by itself.

    Raises:
        ValueError: nothing is called so, or no unit can begin there; says why.
    """
    names = names if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"units must be names of modules or units, such as {_some(known)}, given {names!r}")
    starts = [_start(name, pieces, known, model) for name in names]
    for before, after, name in zip(starts, starts[1:], names[1:], strict=False):
        if before >= after:
            raise ValueError(f"units must be named once each, in the order in which they run: {name!r} comes too late")
    groups = [pieces[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(pieces)], strict=True)]
    for name, group in zip(names, groups, strict=True):
        if not any(piece.mixes for piece in group):
            raise ValueError(f"units: {name!r} has no layer with weights of its own: leave it out")
    return groups


def _start(name, pieces, known, model):
    """The index of the piece that a named unit begins with."""
    if name in known:
        return known[name]
    if name not in dict(model.named_modules()):
        raise ValueError(
            f"units: no module or unit of {type(model).__name__} is called {name!r}: expected paths of its modules, "
            f"such as {_some(known)}"
        )
    for index, piece in enumerate(pieces):
        inside = [any(path == name for path, _ in call.within) for call in piece.calls]
        if any(inside):
            if not inside[0]:
                raise ValueError(
                    f"units: {name!r} begins where more than one tensor goes on, and no unit can: name a module that "
                    f"holds it whole, such as {_some(known)}"
                )
            return index
    raise ValueError(f"units: {name!r} is not run before the classifier: expected parts such as {_some(known)}")


def _some(known):
    return ", ".join(repr(name) for name in [*known][:4])
