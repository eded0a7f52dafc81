"""The README and the documentation: every Python block runs as it is printed, in an empty folder, with neither a
network nor a GPU; every command is one that there is; every link leads somewhere."""

import copy
import re
import shlex
import warnings
from pathlib import Path

import nets
import pytest

from auglocal_ext.cli.program import parser_of_all

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "csrc" / "README.md"]
FENCE = re.compile(r"^```(\w[^\n]*)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BEGINNING = """\
import torch, torchvision, auglocal_ext

model = torchvision.models.resnet18(num_classes=10)
loader = [(torch.randn(8, 3, 64, 64), torch.arange(8))]
"""  # what the examples of every page go on from; the images are smaller


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, kind):
    return [text for info, text in FENCE.findall(page.read_text()) if info == kind]


def commands(page):
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    alone = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in alone if part]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.fixture
def _empty_folder_and_narrow_network(torchvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nets.narrow(torchvision, "resnet18")
    monkeypatch.setattr(torchvision.models, "resnet18", lambda num_classes, weights=None: copy.deepcopy(model))


@pytest.mark.usefixtures("_empty_folder_and_narrow_network")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    names = {"__name__": "page"}  # which its classes are told to be from
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(BEGINNING, names)
        for block in blocks(page, "python"):
            exec(compile(block, name_of(page), "exec"), names)


def test_the_quickstart_of_the_readme_is_what_other_pages_go_on_from():
    beginning = BEGINNING.partition("loader = ")[0]
    assert any(block.startswith(beginning) for block in blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_there_is(command):
    program, *arguments = shlex.split(command)
    if program == "auglocal":
        parser_of_all().parse_args([argument.replace("DATA", ".").replace("ROOT", ".") for argument in arguments])
    elif program == "python":
        text = (ROOT / arguments[0]).read_text() + "".join((ROOT / "python" / "queued.py").read_text())
        text += (ROOT / "auglocal_ext" / "cli" / "training_options.py").read_text()
        for option in (argument for argument in arguments[1:] if argument.startswith("--")):
            assert f'"{option}"' in text, option
    else:
        assert program in ("pip", "pytest", "ruff", "mypy", "sphinx-build", "torchrun", "cmake"), program


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page):
    named = re.findall(r"`((?:auglocal_ext|benchmarks|csrc|docs|python|tests)/[\w./-]+)`", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
