"""The package's folders are layers: a module imports from its own folder or from lower ones, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import auglocal_ext

PACKAGE = Path(auglocal_ext.__file__).parent
# From the bottom to the top; those of one line know nothing of each other.
LAYERS = [
    {"common"},
    {"ops", "distributed", "data", "report", "models", "optim"},
    {"engine"},
    {"backbone"},
    {"rules"},
    {"planning"},
    {"training"},
    {"stages"},
    {"analysis"},
    {"cli"},
    {"__init__", "__main__"},
]


def imports():
    """Module -> modules of the package that it imports, as tuples of names."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*name[: len(name) - node.level], *filter(None, (node.module or "").split(".")))
                for alias in node.names:
                    named = {(*base, alias.name), base, (*base, alias.name, "__init__")} & files.keys()
                    # Else a name of a folder's; the package itself has only what was compiled.
                    found[name] |= named or ({(*base, "__init__")} & files.keys() if base else set())
    return {name: used - {name} for name, used in found.items()}


def test_no_folder_reaches_up():
    height = {folder: index for index, layer in enumerate(LAYERS) for folder in layer}
    for module, used in imports().items():
        for other in used:
            if module[0] != other[0]:
                assert height[other[0]] < height[module[0]], f"{'.'.join(module)} imports {'.'.join(other)}"


def test_no_circle():
    assert len(list(TopologicalSorter(imports()).static_order())) > 60


def test_no_file_is_longer_than_400_lines():
    assert not [str(path) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400]
