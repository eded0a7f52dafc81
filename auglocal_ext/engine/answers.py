"""What operators make of tensors without data, remembered: of equal shapes, strides, dtypes and numbers it is the same.

torch's own answers on the meta device come from decompositions in Python, of milliseconds for some operators, and a
plan asks for the same ones for every unit alike, in every pass and every cut that it compares.
"""

import functools

import torch

__all__ = ["Asked", "asked", "form", "forms_of", "is_plain", "made_again"]

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
        kind, forms = known
        made = [made_again(one, self.given) for one in forms]
        return (made[0] if kind is None else kind(made),)

    def remember(self, result):
        """Remembers an answer, where all of it is as new tensors would be and nothing given has changed its form."""
        kind = type(result) if isinstance(result, tuple | list) else None
        forms = forms_of([result] if kind is None else result, self.given)
        again = _told(self.args, []), _told(tuple(self.kwargs.items()), [])
        if forms is not None and again == self.question[1:]:
            if len(_known) >= MOST:
                _known.clear()
            _known[self.question] = kind, forms


def forms_of(made, given):
    """By what each of several results can be made again: (which of the tensors `given` it is, None) or (None, its form)
    or, where it is no tensor, ((), itself); None: one of them is something else, such as a view of another one."""
    storages = [x.untyped_storage()._cdata for x in given]
    forms = []
    for value in made:
        place = next((i for i, x in enumerate(given) if x is value), None)
        if is_plain(value):
            forms.append(((), value))
        elif place is not None:
            forms.append((place, None))
        elif _is_whole(value) and value.untyped_storage()._cdata not in storages:
            storages.append(value.untyped_storage()._cdata)
            forms.append((None, form(value)))
        else:
            return None
    return forms


def made_again(one, given):
    """A result by one of `forms_of`."""
    place, what = one
    if place is None:
        shape, stride, dtype = what
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return what if place == () else given[place]


def is_plain(value):
    """Whether a value says itself all that there is to it: None, a number, a dtype, or a tuple of such, as of sizes."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, int | float | str | torch.dtype | torch.memory_format | type(None))


def form(tensor):
    """What is known of a tensor without data."""
    return tensor.shape, tensor.stride(), tensor.dtype


@functools.cache
def _makes_new(function):
    """Whether an operator's results are tensors, new or written over what it was given, and no views of it."""
    returns = function._schema.returns
    views = any(made.alias_info is not None and not made.alias_info.is_write for made in returns)
    tensors = all("Tensor" in str(made.type) for made in returns)
    return tensors and not views and torch.Tag.inplace_view not in function.tags


def _told(value, given):
    """What an answer can depend on, of an argument; given: to which its tensors are added."""
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple([_told(each, given) for each in value])
    if isinstance(value, torch.Tensor):
        given.append(value)
        return form(value)
    return kind, value  # 1, 1.0 and True are equal


def _is_whole(value):
    """Whether a value is a tensor without data and without a graph, in a memory of just its size."""
    if not isinstance(value, torch.Tensor) or not value.is_meta or value.requires_grad or value.storage_offset():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.untyped_storage().nbytes() == (extent * value.itemsize if value.numel() else 0)
