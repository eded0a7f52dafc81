"""The cheapest cut under a memory budget: what the search works on is exact, what it finds fits, its errors help."""

import itertools
import random
import re
from dataclasses import replace
from functools import partial

import nets
import pytest
import torch
from calibration_helpers import samples as calibration_samples
from torch import nn

from auglocal_ext import LocalTrainer, models, plan, train
from auglocal_ext.common.memory import LiveBytes, format_bytes, parse_bytes
from auglocal_ext.planning import budget as budget_module
from auglocal_ext.planning import calibration, search
from auglocal_ext.planning.menu import Menu
from auglocal_ext.planning.module_ways import module_ways
from auglocal_ext.planning.planner import Planner
from auglocal_ext.planning.search import Point
from auglocal_ext.planning.walker import Walker
from auglocal_ext.rules import BP
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.cutting import cut


def bottlenecks(torchvision):
    return nets.resnet(torchvision, "Bottleneck", (2, 2, 3, 1), 16)


def vgg(torchvision, batch_norm=False):
    """With narrow features, and most weights in the classifier."""
    layers = [8, 8, "M", 16, "M", 32, 32, "M"] if batch_norm else [8, "M", 16, "M", 32, 32, "M", 64, "M"]
    classifier = nn.Sequential(nn.Linear(49 * layers[-2], 1024), nn.ReLU(True), nn.Dropout(), nn.Linear(1024, 10))
    return nets.vgg(torchvision, layers, batch_norm, classifier=classifier)


vgg_bn = partial(vgg, batch_norm=True)
NETWORKS = {
    "resnet20": (lambda tv: models.resnet20(), (8, 3, 32, 32), 3, {}),
    "resnet20 in bf16": (lambda tv: models.resnet20(), (8, 3, 32, 32), 4, {"precision": "bf16"}),
    "resnet56 with AdamW": (lambda tv: models.resnet56(), (4, 3, 32, 32), 4, {"optimizer": torch.optim.AdamW}),
    "resnet": (nets.resnet, (4, 3, 64, 64), 2, {}),
    "bottlenecks": (bottlenecks, (4, 3, 64, 64), 5, {}),
    "vgg": (vgg, (4, 3, 70, 70), 4, {}),
    "vgg_bn in bf16": (vgg_bn, (4, 3, 32, 32), 3, {"precision": "bf16"}),
}


@pytest.mark.parametrize(("make", "shape", "depth", "options"), NETWORKS.values(), ids=NETWORKS)
def test_the_table_gives_every_cut_its_exact_bytes_and_macs(torchvision, make, shape, depth, options, long):
    """Of any borders, nets and units that run again."""
    with torch.device("meta"):
        planner = Planner(make(torchvision), **options)
    rules, units, rng = [AugLocal(depth), AugLocal(2, None, "light")], planner.backbone.units, random.Random(0)
    table = Walker(planner, shape, rules).table(rules, (False, True))
    heads = [planner.heads_by_unit(rule, shape) for rule in rules]
    for case in range(6 if long else 4):
        borders = tuple(sorted(rng.sample(range(len(units) - 1), rng.randint(0, min(6, len(units) - 1)))))
        which = [rng.randrange(2) for _ in borders]
        again = [case > 1 and rng.random() < 0.5 for _ in units]
        parts = list(zip((0, *(b + 1 for b in borders)), (*borders, len(units) - 1), strict=True))
        only = replace(
            table,
            units=[[ways[a]] for ways, a in zip(table.units, again, strict=True)],
            heads=[[ways[which[borders.index(k)]] if k in borders else ways[0]] for k, ways in enumerate(table.heads)],
        )
        modules = module_ways(only)
        (ways,) = zip(*(modules[i][j - i] for i, j in parts), strict=True)
        macs, states, peaks, *_ = zip(*ways, strict=True)
        names = tuple(unit.name for unit, a in zip(units, again, strict=True) if a) or False
        made = [*(heads[rule][b] for b, rule in zip(borders, which, strict=True)), None]
        cuts = cut(planner.backbone, rules[0], borders=borders)
        planned = planner.with_recompute(names).plan(cuts, shape, rules[0], made)
        predicted = table.constant + sum(states) + max(peaks)
        if names:  # what fits under the peak is kept, not run again, which can lower the peak
            assert planned.peak_bytes <= predicted <= 1.07 * planned.peak_bytes and planned.macs <= sum(macs)
        else:
            assert (planned.peak_bytes, planned.macs) == (predicted, sum(macs))


@pytest.mark.parametrize("make", [vgg_bn, vgg, nets.resnet], ids=["vgg_bn", "vgg", "resnet"])
def test_any_units_of_a_module_may_run_again(torchvision, make, monkeypatch, long):
    """Each beside each other one that does or does not: the bytes are those of the walk of the whole module, before
    anything is kept that need not be."""
    monkeypatch.setattr(
        Planner, "_filled", lambda planner, parts, *batch: planner._walks(parts, *batch, [()] * len(parts))
    )
    with torch.device("meta"):
        planner = Planner(make(torchvision))
    shape, rules, units = (8, 3, 64, 64), [AugLocal(2, None, "light")], planner.backbone.units
    table = Walker(planner, shape, rules).table(rules, (False, True))
    heads = planner.heads_by_unit(rules[0], shape)
    for first in range(0, len(units) - 2, 1 if long else 3):
        for flags in itertools.product((False, True), repeat=3):
            again = [first <= k <= first + 2 and flags[k - first] for k in range(len(units))]
            only = replace(table, units=[[ways[a]] for ways, a in zip(table.units, again, strict=True)])
            borders = [b for b in (first - 1, first + 2) if 0 <= b < len(units) - 1]
            parts = list(zip((0, *(b + 1 for b in borders)), (*borders, len(units) - 1), strict=True))
            modules = module_ways(only)
            peak = max(modules[i][j - i][0][2] for i, j in parts)
            names = tuple(unit.name for unit, a in zip(units, again, strict=True) if a) or False
            made = [*(heads[b] for b in borders), None]
            planned = planner.with_recompute(names).plan(
                cut(planner.backbone, rules[0], borders=borders), shape, rules[0], made
            )
            state = sum(table.heads[b][0].state for b in borders)
            assert planned.peak_bytes == table.constant + state + peak, (first, flags)


def test_the_choice_is_the_cheapest_that_fits():
    shape = (64, 3, 32, 32)
    planned = plan(models.resnet20(), shape, 3, memory_budget="40MB")
    choice = planned.choice
    assert planned.peak_bytes == choice.point.bytes <= 40e6
    assert planned.macs == choice.point.cost
    assert planned.borders == choice.point.borders
    for modules in range(1, 11, 3):
        other = plan(models.resnet20(), shape, 3, modules=modules)
        assert other.peak_bytes > 40e6 or other.macs >= planned.macs
    assert choice.next_cheaper.cost < planned.macs and choice.next_cheaper.bytes > 40e6
    assert choice.next_smaller.bytes < planned.peak_bytes and choice.next_smaller.cost >= planned.macs
    text = str(planned)
    for line in ("budget 40 MB: ", "next cheaper: ", "next smaller: ", "rule='checkpoint' ", "eager BP "):
        assert line in text


@pytest.mark.usefixtures("nothing_compared")
def test_a_large_budget_gives_backpropagation():
    planned = plan(models.resnet20(), (64, 3, 32, 32), 3, memory_budget=10**9)
    assert len(planned.modules) == 1 and planned.macs == planned.bp_macs


@pytest.mark.usefixtures("nothing_compared")
def test_the_number_of_modules_and_the_depth_can_be_given_or_left():
    shape, network = (64, 3, 32, 32), models.CifarResNet(1)
    fixed = plan(network, shape, 3, modules=2, memory_budget="80MB")
    assert len(fixed.modules) == 2 and fixed.depth == 3
    budget = plan(network, shape, 3, modules=2).peak_bytes
    free = plan(network, shape, "auto", memory_budget=budget)
    assert free.depth in (None, *range(2, 7))  # None: of several
    assert free.macs <= plan(network, shape, 3, memory_budget=budget).macs
    assert len(plan(network, shape, rule="bp", memory_budget="1GB").modules) == 1


@pytest.mark.usefixtures("nothing_compared")
def test_a_budget_too_small_says_what_would_do():
    model, shape = models.CifarResNet(1), (64, 3, 16, 16)
    with pytest.raises(ValueError, match=r"memory_budget 3 MB is too small for batches of 64: the smallest") as error:
        plan(model, shape, 2, memory_budget="3MB")
    text = str(error.value)
    smallest = int(text.split("(")[1].split(" bytes")[0].replace(",", ""))
    assert plan(model, shape, 2, memory_budget=smallest).peak_bytes == smallest
    batch = int(re.search(r"that, or batches of (\d+)", text)[1])
    assert plan(model, (batch, *shape[1:]), 2, memory_budget="3MB").peak_bytes <= 3e6
    # And what others need: with their words, as arguments, what is said of them fits.
    others = re.findall(r"with (\w+)=(\S+) needs ([\d.]+ MB) \(batches of about (\d+)\)", text)
    assert {name for name, *_ in others} >= {"auxiliary", "recompute"}
    for name, value, least, about in others[:1]:
        arguments = {"depth": 2, name: int(value) if name == "depth" else value.strip("'")}
        found = plan(model, shape, memory_budget=1.006 * parse_bytes(least), **arguments)
        assert found.peak_bytes <= 1.006 * parse_bytes(least)
        plan(model, (int(about) - 1, *shape[1:]), memory_budget="3MB", **arguments)
    with pytest.raises(ValueError, match="too small"):
        plan(model, (batch + 1, *shape[1:]), 2, memory_budget="3MB")
    with pytest.raises(ValueError, match="the model's parameters and optimizer state alone are 627 kB"):
        plan(model, shape, 2, memory_budget="500kB")


def test_a_refusal_walks_few_batches(monkeypatch, long):
    """And names the batch that trying every one would find."""
    shape, rules, walked = (16, 3, 16, 16), [AugLocal(2), AugLocal(3)], set()

    def table(menu, kind, shape=None, real=Menu.table):
        walked.add((shape or menu.shape)[0])
        return real(menu, kind, shape)

    monkeypatch.setattr(Menu, "table", table)
    with torch.device("meta"):
        planner = Planner(models.CifarResNet(1))
    for modules, fit in ((None, 5), (3, 9), (None, 14))[: 3 if long else 2]:
        least = {}
        for batch in (2, fit, fit + 1, 16):
            menu = Menu(planner, (batch, *shape[1:]), rules, modules, False)
            least[batch] = search.smallest(menu.points(menu.asked)).bytes
        walked.clear()
        error = rf"\({least[16]:,} bytes\); give at least that, or batches of {fit}\."
        with pytest.raises(ValueError, match=error):
            budget_module.choose(planner, shape, (least[fit] + least[fit + 1]) // 2, rules, modules)
        assert len(walked) <= 5 and {2, fit, fit + 1, 16} <= walked
    with pytest.raises(ValueError, match=r"and no batch of two images fits it\."):
        budget_module.choose(planner, shape, least[2] - 1, rules, modules)


@pytest.mark.usefixtures("nothing_compared")
def test_recomputation_unit_by_unit_is_a_choice():
    model, shape = models.CifarResNet(2), (64, 3, 16, 16)
    bp, checkpoint = (plan(model, shape, rule=rule) for rule in ("bp", "checkpoint"))
    budget = (bp.peak_bytes + checkpoint.peak_bytes) // 2
    some = plan(model, shape, rule="bp", recompute="auto", memory_budget=budget)
    assert some.rule == "bp" and checkpoint.peak_bytes < some.peak_bytes == some.choice.point.bytes <= budget
    assert bp.macs < some.macs < checkpoint.macs
    assert 0 < len(some.modules[0].recomputed) < len(some.modules[0].units)
    assert f"convolutions that run again in the backward: those of {some.modules[0].recomputed[0]}" in str(some)
    # Both ends are points of the same search.
    for planned in (bp, checkpoint):
        found = plan(model, shape, "auto", recompute="auto", memory_budget=planned.peak_bytes)
        assert found.peak_bytes <= planned.peak_bytes and found.macs <= planned.macs
    menu = Menu(Planner(model), shape, [BP()], None, "auto")
    ends = {point.again: point.bytes for point in menu.points(menu.asked) if len(point.again) in (0, 7)}
    assert ends == {(): bp.peak_bytes, tuple(range(7)): checkpoint.peak_bytes} or tuple(range(7)) not in ends
    assert menu.recomputed(Point(1, 0, 0, (), (), tuple(range(7)))) is True
    assert menu.recomputed(Point(1, 0, 0, (), (), (1, 6))) == ("layer1.0", "layer3.1")


@pytest.mark.usefixtures("nothing_compared")
def test_nets_are_a_choice_border_by_border():
    model, shape = models.CifarResNet(2), (64, 3, 16, 16)
    budget = plan(model, shape, 3, modules=3).peak_bytes
    options = {"memory_budget": budget, "recompute": "auto"}
    asked = {aux: plan(model, shape, 3, auxiliary=aux, **options) for aux in ("light", "auto")}
    assert asked["auto"].macs <= asked["light"].macs and asked["light"].choice.more is None
    plain = plan(model, shape, 3, memory_budget=budget)
    words, point = plain.choice.more
    assert words == "auxiliary='light', recompute='auto'" and point.cost < plain.macs and words in str(plain)
    assert asked["auto"].macs <= plain.macs
    free = plan(model, shape, "auto", auxiliary="auto", **options)
    assert free.macs <= asked["auto"].macs
    trainer = LocalTrainer(model, plan=free)
    trainer.step(torch.randn(shape).to(memory_format=torch.channels_last), torch.arange(64) % 10)
    assert len(trainer.aux_nets) == len(free.borders) > 0 and trainer.plan is free


def test_what_to_prefer(monkeypatch, tmp_path):
    model, shape = models.CifarResNet(1), (64, 3, 16, 16)
    budget = plan(model, shape, rule="bp").peak_bytes
    small = plan(model, shape, 2, memory_budget=budget, prefer="memory")
    assert small.peak_bytes == min(point.bytes for point in small.choice.front) and small.choice.more is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="run `auglocal calibrate --device cpu --precision fp32`"):
        plan(model, shape, 2, memory_budget=budget, prefer="time")
    calibration.save(calibration.machine("cpu", "fp32"), calibration_samples())
    fast = plan(model, shape, 2, memory_budget=budget, prefer="time")
    assert fast.choice.point.cost == min(p.cost for p in fast.choice.front if p.bytes <= budget)
    assert fast.choice.point.cost == pytest.approx(1e6 * fast.milliseconds, rel=0.05)
    assert " ms predicted" in str(fast) and fast.comparison.bp.milliseconds > 0
    fast.save_front(tmp_path / "front.png")
    for arguments, words in (({"prefer": "speed"}, "prefer must be one of"), ({"prefer": "time"}, "under a budget")):
        with pytest.raises(ValueError, match=words):
            plan(model, shape, 2, **arguments)


@pytest.mark.usefixtures("nothing_compared")
def test_other_activations_are_predicted_too():
    model = models.CifarResNet(1)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    for rule in ("bp", "auglocal"):
        planned = plan(model, (8, 3, 16, 16), 2, rule=rule, memory_budget="1GB", prefer="memory")
        found = plan(model, (8, 3, 16, 16), 2, rule=rule, memory_budget=planned.peak_bytes)
        assert found.peak_bytes <= planned.peak_bytes


def test_a_depth_that_the_rules_own_cut_cannot_have():
    assert len(plan(models.CifarResNet(1), (4, 3, 32, 32), 4, memory_budget="1GB").modules) == 1


@pytest.mark.usefixtures("nothing_compared")
def test_a_net_of_ones_own_goes_with_a_budget():
    def net(border):
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * border.shape[0], border.num_classes))

    model, shape = models.resnet20(), (16, 3, 32, 32)
    planned = plan(model, shape, auxiliary=net, memory_budget="13MB", recompute="auto")
    assert planned.peak_bytes == planned.choice.point.bytes <= 13e6 and len(planned.modules) > 1
    with pytest.raises(TypeError, match="auxiliary must make a torch.nn.Module of a border, it made int"):
        plan(model, shape, auxiliary=lambda border: 3)


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


@pytest.mark.usefixtures("nothing_compared")
def test_which_rules_have_a_budget():
    class Deep(AugLocal):
        pass

    model, shape = models.CifarResNet(1), (8, 3, 16, 16)
    by_name = plan(model, shape, "auto", memory_budget="1.7MB")
    assert plan(model, shape, "auto", rule=AugLocal, memory_budget="1.7MB") == by_name
    with pytest.raises(
        ValueError, match="depth='auto' and auxiliary='auto' go with .* given a rule that has its own, of depth 3"
    ):
        plan(model, shape, "auto", rule=AugLocal(3), memory_budget="1.7MB")
    with pytest.raises(ValueError, match="with 'deep' give modules"):
        plan(model, shape, rule=Deep, memory_budget="1.7MB")
    again = plan(model, shape, rule="checkpoint", memory_budget="9GB")
    assert again.choice.point.cost >= again.macs > 1.2 * again.bp_macs
    assert f"MACs {again.choice.point.cost / again.bp_macs:.3f} x BP" in str(again)


@pytest.mark.usefixtures("nothing_compared")
def test_train_cuts_by_the_budget(capsys):
    torch.manual_seed(0)
    shape, loader = (16, 3, 32, 32), [(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)] * 2
    budget = plan(models.CifarResNet(2), shape, rule="bp").peak_bytes - 1
    result = train(models.CifarResNet(2), loader, 2, memory_budget=budget, epochs=1)
    assert len(result.plan.modules) > 1
    assert result.peak_bytes == result.plan.peak_bytes <= budget
    assert f"budget {format_bytes(budget)}: " in capsys.readouterr().out
    assert result.plan.borders == plan(models.CifarResNet(2), shape, 2, memory_budget=budget).borders


def test_pictures(tmp_path):
    planned = plan(models.CifarResNet(1), (16, 3, 32, 32), 3, memory_budget="12MB")
    planned.save_picture(tmp_path / "plan.png")
    planned.save_front(tmp_path / "front.svg")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "front.svg").read_text()
    assert "</svg>" in text


@pytest.mark.usefixtures("nothing_compared")
def test_a_transformer_under_a_budget(torchvision):
    """Of tokens, which have no memory format."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 4, 2, 32, 64, num_classes=10)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    most = plan(model, images.shape, rule="bp", memory_format=torch.contiguous_format).peak_bytes
    given = {"auxiliary": "light", "memory_format": torch.contiguous_format}
    planned = plan(model, images.shape, 2, memory_budget=int(0.85 * most), **given)
    assert len(planned.modules) > 1 and planned.peak_bytes <= 0.85 * most
    trainer = LocalTrainer(model, plan=planned)
    trainer.step(images, labels)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert live.peak == planned.peak_bytes
