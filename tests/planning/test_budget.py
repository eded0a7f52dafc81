"""The cheapest cut under a memory budget: what the search works on is exact, what it finds fits, its errors help."""

import random

import pytest
import torch

from auglocal_ext import models, plan, train
from auglocal_ext.common.memory import format_bytes, parse_bytes
from auglocal_ext.planning import budget as budget_module
from auglocal_ext.planning import refusal, search
from auglocal_ext.planning.cut_table import module_options
from auglocal_ext.planning.planner import Planner
from auglocal_ext.planning.walker import cut_table
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.cutting import cut

NETWORKS = [
    ("resnet20", (8, 3, 32, 32), 3, {}),
    ("resnet32", (8, 3, 32, 32), 4, {"precision": "bf16"}),
    ("resnet110", (4, 3, 32, 32), 4, {"optimizer": torch.optim.AdamW}),
    ("resnet18", (4, 3, 64, 64), 4, {}),
    ("resnet50", (4, 3, 64, 64), 5, {}),
    ("vgg13", (4, 3, 70, 70), 5, {}),
    ("vgg11_bn", (4, 3, 32, 32), 3, {"precision": "bf16"}),
]


@pytest.mark.parametrize(("name", "shape", "depth", "options"), NETWORKS)
def test_the_table_gives_every_cut_its_exact_bytes_and_macs(torchvision, name, shape, depth, options):
    with torch.device("meta"):
        planner = Planner(models.create(name, 10), **options)
    rule = AugLocal(depth)
    table, units = cut_table(planner, shape, rule), len(planner.backbone.units)
    options, rng = module_options(table), random.Random(0)
    for _ in range(4):
        borders = tuple(sorted(rng.sample(range(units - 1), rng.randint(0, 6))))
        parts = list(zip((0, *(b + 1 for b in borders)), (*borders, units - 1), strict=True))
        ways = [options[i][j - i][0] for i, j in parts]
        highest = max(peak for _, _, peak in ways)
        planned = planner.plan(cut(planner.backbone, rule, borders=borders), shape, rule)
        assert table.constant + sum(state for _, state, _ in ways) + highest == planned.peak_bytes
        assert sum(macs for macs, _, _ in ways) == planned.macs


def test_the_choice_is_the_cheapest_that_fits():
    shape = (64, 3, 32, 32)
    planned = plan(models.resnet20(), shape, 3, memory_budget="40MB")
    choice = planned.choice
    assert planned.peak_bytes == choice.point.bytes <= 40e6
    assert planned.macs == choice.point.macs
    assert planned.borders == choice.point.borders
    for modules in range(1, 11, 3):
        other = plan(models.resnet20(), shape, 3, modules=modules)
        assert other.peak_bytes > 40e6 or other.macs >= planned.macs
    assert choice.next_cheaper.macs < planned.macs and choice.next_cheaper.bytes > 40e6
    assert choice.next_smaller.bytes < planned.peak_bytes and choice.next_smaller.macs >= planned.macs
    text = str(planned)
    for line in ("budget 40 MB: ", "next cheaper: ", "next smaller: ", "rule='checkpoint' ", "eager BP "):
        assert line in text


def test_a_large_budget_gives_backpropagation():
    planned = plan(models.resnet20(), (64, 3, 32, 32), 3, memory_budget=10**9)
    assert len(planned.modules) == 1 and planned.macs == planned.bp_macs


def test_the_number_of_modules_and_the_depth_can_be_given_or_left():
    shape, network = (64, 3, 32, 32), models.CifarResNet(2)
    fixed = plan(network, shape, 3, modules=4, memory_budget="80MB")
    assert len(fixed.modules) == 4 and fixed.depth == 3
    budget = plan(network, shape, 3, modules=3).peak_bytes
    free = plan(network, shape, "auto", memory_budget=budget)
    assert free.depth in range(2, 7)
    assert free.macs <= plan(network, shape, 3, memory_budget=budget).macs
    assert len(plan(network, shape, rule="bp", memory_budget="1GB").modules) == 1


def test_a_budget_too_small_says_what_would_do():
    shape = (64, 3, 32, 32)
    with pytest.raises(ValueError, match=r"memory_budget 10 MB is too small for batches of 64: the smallest") as error:
        plan(models.CifarResNet(2), shape, 3, memory_budget="10MB")
    text = str(error.value)
    smallest = int(text.split("(")[1].split(" bytes")[0].replace(",", ""))
    assert plan(models.CifarResNet(2), shape, 3, memory_budget=smallest).peak_bytes == smallest
    batch = int(text.rsplit(" ", 1)[1])
    assert plan(models.CifarResNet(2), (batch, *shape[1:]), 3, memory_budget="10MB").peak_bytes <= 10e6
    with pytest.raises(ValueError, match="too small"):
        plan(models.CifarResNet(2), (batch + 1, *shape[1:]), 3, memory_budget="10MB")
    with pytest.raises(ValueError, match="the model's parameters and optimizer state alone are 1.4. MB"):
        plan(models.CifarResNet(2), shape, 3, memory_budget="1MB")


def test_a_refusal_walks_few_batches(monkeypatch):
    """And names the batch that trying every one would find."""
    shape, rules, walked = (16, 3, 16, 16), [AugLocal(2), AugLocal(3)], []

    def tables(planner, shape, rules, real=budget_module.cut_tables):
        walked.append(shape[0])
        return real(planner, shape, rules)

    monkeypatch.setattr(budget_module, "cut_tables", tables)
    monkeypatch.setattr(refusal, "cut_tables", tables)
    with torch.device("meta"):
        planner = Planner(models.CifarResNet(1))
    fronts = {
        batch: [search.front(table) for table in tables(planner, (batch, *shape[1:]), rules)] for batch in range(2, 17)
    }
    for modules, fit in ((None, 5), (None, 14), (3, 9)):
        least = {b: min(search.smallest(front, modules).bytes for front in fronts[b]) for b in fronts}
        walked.clear()
        error = rf"\({least[16]:,} bytes\); give at least that, or batches of {fit}$"
        with pytest.raises(ValueError, match=error):
            budget_module.choose(planner, shape, (least[fit] + least[fit + 1]) // 2, rules, modules)
        assert len(walked) <= 5 and {2, fit, fit + 1, 16} <= set(walked)
    with pytest.raises(ValueError, match="and no batch of two images fits it$"):
        budget_module.choose(planner, shape, least[2] - 1, rules, modules)


@pytest.mark.parametrize("text", ["6 parsecs", "", "GB", "-1GB", "0", "1e9x", None, True])
def test_a_budget_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="memory_budget must be a size such as '6GB'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6e9), ("1.5 gb", 1.5e9), ("500 MB", 5e8), ("4GiB", 4 * 2**30), ("12", 12), (12, 12), (3e9, 3e9)],
)
def test_budgets_are_read(text, size):
    assert parse_bytes(text) == size


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="depth='auto' chooses under a budget: give memory_budget too"):
        plan(models.resnet20(), (8, 3, 32, 32), "auto")
    with pytest.raises(ValueError, match="depth must be at most"):
        plan(models.resnet20(), (8, 3, 32, 32), 30, memory_budget="1GB")
    with pytest.raises(ValueError, match="modules must be a whole number from 1 to 10"):
        plan(models.resnet20(), (8, 3, 32, 32), 3, modules=11, memory_budget="1GB")
    with pytest.raises(ValueError, match="save_front draws the search under a memory budget"):
        plan(models.resnet20(), (8, 3, 32, 32), 3).save_front("front.png")


def test_which_rules_have_a_budget():
    class Deep(AugLocal):
        pass

    model, shape = models.resnet20(), (8, 3, 32, 32)
    by_name = plan(model, shape, "auto", memory_budget="8MB")
    assert plan(model, shape, "auto", rule=AugLocal, memory_budget="8MB") == by_name
    with pytest.raises(ValueError, match="depth='auto' goes with rule='auglocal', given a rule that has its depth, 3"):
        plan(model, shape, "auto", rule=AugLocal(3), memory_budget="8MB")
    with pytest.raises(ValueError, match="with 'deep' give modules"):
        plan(model, shape, rule=Deep, memory_budget="8MB")
    again = plan(model, shape, rule="checkpoint", memory_budget="9GB")
    assert again.choice.point.macs >= again.macs > 1.2 * again.bp_macs
    assert f"MACs {again.choice.point.macs / again.bp_macs:.3f} x BP" in str(again)


def test_train_cuts_by_the_budget(capsys):
    torch.manual_seed(0)
    shape, loader = (16, 3, 32, 32), [(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)] * 3
    budget = plan(models.CifarResNet(2), shape, rule="bp").peak_bytes - 1
    result = train(models.CifarResNet(2), loader, 2, memory_budget=budget, epochs=1)
    assert len(result.plan.modules) > 1
    assert result.peak_bytes == result.plan.peak_bytes <= budget
    assert f"budget {format_bytes(budget)}: " in capsys.readouterr().out
    assert result.plan.borders == plan(models.CifarResNet(2), shape, 2, memory_budget=budget).borders


def test_pictures(tmp_path):
    planned = plan(models.resnet20(), (16, 3, 32, 32), 3, memory_budget="12MB")
    planned.save_picture(tmp_path / "plan.png")
    planned.save_front(tmp_path / "front.svg")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "front.svg").read_text()
    assert "</svg>" in text
