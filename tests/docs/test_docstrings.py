"""What docs/api.md lists is documented: a docstring of its own, in which every parameter and every field is named."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

API = Path(__file__).resolve().parents[2] / "docs" / "api.md"
DIRECTIVE = re.compile(r"^\.\. auto\w+:: (\S+)\n(?:   :members:(.*)\n)?", re.MULTILINE)
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
    for path, members in (match.groups() for match in DIRECTIVE.finditer(text)):
        shown[path] = parent = found(path)
        if members is not None:
            names = [name.strip() for name in members.split(",") if name.strip()] or public(parent)
            shown |= {f"{path}.{name}": inspect.getattr_static(parent, name) for name in names}
    return shown


def parameters(given):
    """Names of what a function or a class is called with, or has as fields."""
    if inspect.ismodule(given) or isinstance(given, property):
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
    given = getattr(given, "__func__", given)  # of a classmethod
    taken = inspect.signature(given).parameters.items()
    return [name for name, one in taken if name not in ("self", "cls") and one.kind not in UNNAMED]


def faults(given):
    """What a docstring lacks, in words."""
    text = vars(given).get("__doc__") if inspect.isclass(given) else given.__doc__
    if not text or (inspect.isclass(given) and text.startswith(f"{given.__name__}(")):  # made by dataclass
        return ["no docstring of its own"]
    if isinstance(given, property) and ": " in text.partition("\n")[0]:
        return ["a first line whose beginning the page takes for a type"]
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
        """Of a alone; what is `absent` is none of them."""

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

    assert faults(undocumented) == faults(Generated) == ["no docstring of its own"]
    assert faults(partly) == ["nothing about b"]
    assert faults(Documented) == faults(Made) == ["nothing about c"]
    assert faults(property(undocumented)) == ["no docstring of its own"]
    assert faults(property(undocumented, doc="Bytes: of what lives.")) and not faults(property(undocumented, doc="A."))
