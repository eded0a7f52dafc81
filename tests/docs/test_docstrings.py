"""What docs/api.md lists is documented: a docstring of its own, in which every parameter and every field is named."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

API = Path(__file__).resolve().parents[2] / "docs" / "api.md"
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: (\S+)\n(?:   :members:(.*)\n)?", re.MULTILINE)
UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def found(path):
    """The module or the object of a path."""
    try:
        return import_module(path)
    except ImportError:
        home, _, name = path.rpartition(".")
        return getattr(found(home), name)


def public(parent):
    """Names of what `:members:` alone shows."""
    if inspect.ismodule(parent):
        return [name for name in parent.__all__ if callable(getattr(parent, name))]
    fields = {*getattr(parent, "__dataclass_fields__", ()), *getattr(parent, "_fields", ())}
    kinds = property, classmethod, staticmethod
    return [
        name
        for name, value in vars(parent).items()
        if not name.startswith("_") and name not in fields and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


def listed(text):
    """{path: object} of what a page in the form of docs/api.md shows, in its order."""
    shown = {}
    for _, path, members in DIRECTIVE.findall(text):
        shown[path] = parent = found(path)
        if f"{path}\n   :members:" in text:
            names = [name.strip() for name in members.split(",") if name.strip()] or public(parent)
            shown |= {f"{path}.{name}": inspect.getattr_static(parent, name) for name in names}
    return {path: _function(value) for path, value in shown.items()}


def _function(value):
    """Of a method or a property what carries the docstring."""
    value = value.fget if isinstance(value, property) else value
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def parameters(given):
    """Names of what a function or a class is called with, or has as fields."""
    if inspect.ismodule(given):
        return []
    if dataclasses.is_dataclass(given):
        return [field.name for field in dataclasses.fields(given) if not field.name.startswith("_")]
    if hasattr(given, "_fields"):
        return list(given._fields)
    if inspect.isclass(given):
        makes = next(vars(kind)["__init__"] for kind in given.__mro__ if "__init__" in vars(kind))
        if not inspect.isfunction(makes):  # object's, or an exception's
            return []
        given = makes
        return [name for name, one in [*inspect.signature(given).parameters.items()][1:] if one.kind not in UNNAMED]
    return [
        name
        for name, one in inspect.signature(given).parameters.items()
        if name not in ("self", "cls") and one.kind not in UNNAMED
    ]


def faults(given):
    """What a docstring lacks, in words."""
    text = vars(given).get("__doc__") if inspect.isclass(given) else given.__doc__
    if not text or (inspect.isclass(given) and text.startswith(f"{given.__name__}(")):  # made by dataclass
        return ["no docstring of its own"]
    if inspect.isclass(given):
        text += vars(given).get("__init__").__doc__ or "" if "__init__" in vars(given) else ""
    return [f"nothing about {name}" for name in parameters(given) if not re.search(rf"\b{name}\b", text)]


SHOWN = listed(API.read_text())


@pytest.mark.parametrize("path", SHOWN)
def test_what_the_page_shows_is_documented(path):
    assert not faults(SHOWN[path])


def test_the_page_was_read():
    """Of each kind of directive something that it must have found."""
    assert {
        "auglocal_ext.train",
        "auglocal_ext.LocalTrainer.ema_model",
        "auglocal_ext.Plan.peak_bytes",
        "auglocal_ext.ops.batch_norm_act",
    } <= SHOWN.keys()


def test_faults_are_found():
    def undocumented(a): ...

    def partly(a, b=0, *others, **options):
        """Of a alone; what is `absent` is not b's."""

    @dataclasses.dataclass
    class Generated:
        a: int

    @dataclasses.dataclass
    class Documented:
        """With a, or without."""

        a: int
        c: int

    class Made:
        """Made of a."""

        def __init__(self, a, c):
            self.a, self.c = a, c

    partly.__doc__ = partly.__doc__.replace("b's", "its")
    assert faults(undocumented) == faults(Generated) == ["no docstring of its own"]
    assert faults(partly) == ["nothing about b"]
    assert faults(Documented) == faults(Made) == ["nothing about c"]
