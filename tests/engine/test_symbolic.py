"""Tracing leaves the process alone: other threads trace, train and serve meanwhile."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.engine.symbolic import Untraceable, symbolic_graph


def in_threads(*runs):
    """Runs functions at once, and raises the first error of any."""
    errors, gate = [], threading.Barrier(len(runs))

    def guarded(run):
        try:
            gate.wait()
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def serving():
    """A model that answers in another thread all the while; `served` counts its answers, and its errors."""
    model, stop, served = models.CifarResNet(1).eval(), threading.Event(), {"answers": 0, "errors": []}
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)

    def serve():
        while not stop.wait(0.001):  # without a pause, it would have the interpreter to itself half of the time
            try:
                with torch.no_grad():
                    assert torch.equal(model(images), expected)
                served["answers"] += 1
            except BaseException as error:
                served["errors"].append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    yield served
    stop.set()
    thread.join()


def test_a_model_serves_while_others_are_planned_and_trained(serving, batch):
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__

    def work(rule):
        plan(models.CifarResNet(1), (4, 3, 16, 16), depth=2, rule=rule)
        LocalTrainer(models.CifarResNet(1), depth=2, rule=rule, image_size=16).step(*batch)

    work("auglocal")
    in_threads(*[lambda rule=rule: work(rule) for rule in ("auglocal", "auglocal", "dgl", "bp")])
    assert serving["errors"] == [] and serving["answers"] > 10
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattribute


def test_a_budget_is_searched_while_a_model_serves(serving):
    in_threads(*[lambda: plan(models.CifarResNet(1), (8, 3, 16, 16), depth=2, memory_budget="50MB")] * 2)
    assert serving["errors"] == [] and serving["answers"] > 10


def test_trainers_in_threads_train_as_alone(batch):
    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        model = models.CifarResNet(1)
        trainer = LocalTrainer(model, depth=2)
        for parameter in [*model.parameters(), *trainer.aux_nets.parameters()]:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        return torch.stack([trainer.step(*batch).module_losses for _ in range(3)])

    alone = [losses(seed) for seed in range(3)]
    together = [None] * 3

    def run(seed):
        together[seed] = losses(seed)

    in_threads(*[lambda seed=seed: run(seed) for seed in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_global_hooks_see_nothing_of_planning(batch):
    """One that reads values would fail on tensors without data."""
    seen = []

    def read(module, given, output):
        seen.append((type(module).__name__, output.flatten()[0].item()))

    handle = nn.modules.module.register_module_forward_hook(read)
    try:
        model = models.CifarResNet(1)
        model.fc = nn.Sequential(nn.Tanh(), model.fc)
        plan(model, (4, 3, 16, 16), depth=2)
        plan(model, (4, 3, 16, 16), depth=2, memory_budget="50MB")
        assert seen == []
        LocalTrainer(model, rule="bp").step(*batch)
        assert {name for name, _ in seen} <= {"AdaptiveAvgPool2d", "Flatten", "Tanh", "Linear"} and seen
    finally:
        handle.remove()


def test_functions_wrapped_for_tracing(torchvision):
    """stochastic_depth branches on values, and is wrapped by torch.fx.wrap: one call in the graph."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), torchvision.ops.StochasticDepth(0.5, "row"))
    graph = symbolic_graph(nn.Sequential(block), {nn.Sequential, torchvision.ops.StochasticDepth})
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    x = torch.randn(4, 3, 2, 2)
    assert torchvision.ops.stochastic_depth(x, 0.0, "row") is x


class Own(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.weight, self.run = nn.Parameter(torch.ones(1)), run

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: x if x.sum() > 0 else -x,
        lambda self, x: x * torch.ones(1),
        lambda self, x: (x, x + 1),
        lambda self, x: x,
        lambda self, x: F.relu(x, inplace=x.sin() is None) if x.cos() is not None else x,
    ],
    ids=["branch", "constant", "two outputs", "nothing", "unused"],
)
def test_what_has_no_graph(run):
    with pytest.raises(Untraceable):
        symbolic_graph(nn.Sequential(Own(run)), {nn.Sequential, Own})


def test_what_has_no_graph_runs_as_it_is(batch, monkeypatch):
    """Blocks whose forward branches on what it is given, in a trained network."""
    model = models.CifarResNet(1).double()
    images, labels = batch[0].double(), batch[1]
    original = models.BasicBlock.forward
    monkeypatch.setattr(models.BasicBlock, "forward", lambda self, x: original(self, x) * (2 if x.shape[1] > 16 else 1))
    expected = F.cross_entropy(model(images), labels)
    trainer = LocalTrainer(model, rule="bp")
    assert trainer.step(images, labels).loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert "layer2.0 (BasicBlock)" in trainer.plan.modules[0].islands
