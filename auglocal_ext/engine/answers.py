"""What operators make of tensors without data, remembered: of equal shapes, strides, dtypes and numbers it is the same.

torch's own answers on the meta device come from decompositions in Python, of milliseconds for some operators, and a
plan asks for the same ones for every unit alike, in every pass and every cut that it compares.
"""

import functools

import torch

__all__ = ["Asked", "asked"]

MOST = 10_000  # answers that are remembered: of a large network and its cuts a few thousand

_known: dict[tuple, tuple] = {}  # question -> answer; nothing in them is of one model


def asked(function, args, kwargs):
    """A call of an operator as what can be remembered, `Asked`; None: its answer may be a view of what it is given, or
    depend on more than what is known of tensors without data."""
    if not _makes_new(function):
        return None
    given = []
    question = _told(args, given), _told(tuple(kwargs.items()), given)
    if not given or not all(x.is_meta for x in given):
        return None
    return Asked((function, *question), args, kwargs, given)


class Asked:
    """A call: what it was given, and by what of it the answer is known."""

    def __init__(self, question, args, kwargs, given):
        self.question, self.args, self.kwargs, self.given = question, args, kwargs, given

    def answer(self):
        """(what the operator makes,) as new tensors or those that it was given; None: not known."""
        known = _known.get(self.question)
        if known is None:
            return None
        kind, parts = known
        made = [self._made(part) for part in parts]
        return (made[0] if kind is None else kind(made),)

    def _made(self, part):
        if part is None:
            return None
        if isinstance(part, int):
            return self.given[part]
        shape, stride, dtype = part
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def remember(self, result):
        """Remembers an answer, where all of it is as new tensors would be and nothing given has changed its form."""
        again = _told(self.args, []), _told(tuple(self.kwargs.items()), [])
        if again != self.question[1:]:
            return
        kind = type(result) if isinstance(result, tuple | list) else None
        results = [result] if kind is None else result
        storages = [x.untyped_storage()._cdata for x in self.given]
        parts = []
        for value in results:
            place = next((i for i, x in enumerate(self.given) if x is value), None)
            if value is None or place is not None:
                parts.append(place)
            elif _is_whole(value) and value.untyped_storage()._cdata not in storages:
                storages.append(value.untyped_storage()._cdata)
                parts.append((tuple(value.shape), value.stride(), value.dtype))
            else:
                return
        if len(_known) >= MOST:
            _known.clear()
        _known[self.question] = kind, parts


@functools.cache
def _makes_new(function):
    """Whether an operator's results are new, or written over what it was given, and no views of it."""
    views = any(made.alias_info is not None and not made.alias_info.is_write for made in function._schema.returns)
    return not views and torch.Tag.inplace_view not in function.tags


def _told(value, given):
    """What an answer can depend on, of an argument; given: to which its tensors are added."""
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple([_told(each, given) for each in value])
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype
    return kind, value  # 1, 1.0 and True are equal


def _is_whole(value):
    """Whether a value is a tensor without data that has a memory of its own, of just its size."""
    if not isinstance(value, torch.Tensor) or not value.is_meta or value.storage_offset():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.untyped_storage().nbytes() == (extent * value.itemsize if value.numel() else 0)
