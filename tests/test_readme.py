"""The README's Python: every block runs as it is printed, in an empty folder, with neither a network nor a GPU."""

import copy
import re
from pathlib import Path

import nets
import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(QUICKSTART,) = (block for block in BLOCKS if block.startswith("import torch, torchvision, auglocal_ext\n"))


def run(block, names):
    exec(compile(block, "README.md", "exec"), names)


@pytest.fixture(autouse=True)
def _empty_folder_and_narrow_network(torchvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nets.narrow(torchvision, "resnet18")
    monkeypatch.setattr(torchvision.models, "resnet18", lambda num_classes: copy.deepcopy(model))


def test_the_quickstart(torchvision, tmp_path):
    names = {}
    run(QUICKSTART, names)
    assert len(names["result"].history) == 10 and (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block != QUICKSTART], ids=lambda block: block.split("\n")[0]
)
def test_a_block_that_goes_on_from_the_quickstart(torchvision, block):
    names = {"__name__": "readme"}  # which its classes are told to be from
    beginning, _ = QUICKSTART.split("result = ")
    run(beginning, names)
    run(block, names)
