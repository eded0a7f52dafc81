"""SyncNorm on two ranks: forward, gradients and statistics are those of torch's BatchNorm of the whole batch; and where
it stands in for other kinds."""

import copy
from datetime import timedelta

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.nodes import Head, Island, Norm, PooledNorm, SyncNorm
from auglocal_ext.engine.nodes.sync_norm import combined
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace

RANKS = ((0, 5), (5, 8))  # of each the images: not as many


class Residual(nn.Module):
    def __init__(self, norm, act):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), norm(4), act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


class OfTokens(nn.Module):
    """A norm of tokens, whose channels are last."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        tokens = self.linear(x.flatten(2).transpose(1, 2))
        return F.gelu(self.bn(tokens.transpose(1, 2))).unsqueeze(3)


class Net(nn.Module):
    """A block between two convolutions, and a classifier with a norm of its own, or None."""

    def __init__(self, block, norm=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), block, nn.Conv2d(4, 4, 1))
        between = () if norm is None else (norm(4), nn.ReLU())
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *between, nn.Linear(4, 3))

    def forward(self, x):
        return self.classifier(self.body(x))


NORM, SYNC = nn.BatchNorm2d, nn.SyncBatchNorm
# name: (the network, whether sync_batch_norm has to be on)
NETS = {
    "residual and ReLU": (lambda: Net(nn.Sequential(Residual(NORM, nn.ReLU()))), True),
    "residual": (lambda: Net(nn.Sequential(Residual(NORM, nn.Identity()), NORM(4, eps=0.1))), True),
    "SiLU": (lambda: Net(nn.Sequential(NORM(4), nn.SiLU())), True),
    "max-pool": (lambda: Net(nn.Sequential(NORM(4, momentum=None), nn.ReLU(), nn.MaxPool2d(2))), True),
    "last": (lambda: Net(nn.Sequential(nn.Conv2d(4, 4, 1), NORM(4), nn.ReLU(), nn.Identity())), True),
    "of tokens": (lambda: Net(OfTokens()), True),
    "of rows": (lambda: Net(nn.Tanh(), nn.BatchNorm1d), True),
    "SyncBatchNorm": (lambda: Net(nn.Sequential(Residual(SYNC, nn.ReLU()), SYNC(4), nn.SiLU()), SYNC), False),
}


def made(name):
    torch.manual_seed(0)
    make, option = NETS[name]
    return make().double(), option


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 9, 8, generator=generator, dtype=torch.float64) + 3
    return images, torch.arange(8) % 3


def nodes_of(net, sync_batch_norm):
    body, out = trace(net.body, {Residual, OfTokens}, "body", "images", sync_batch_norm)
    head, _ = trace(net.classifier, set(), "head", out, sync_batch_norm)
    return body, head, out


def step(net, sync_batch_norm, images, labels, weight=1.0):
    """A step's logits and loss, gradients and statistics, by name."""
    body, head, _ = nodes_of(net, sync_batch_norm)
    program = build(join(body, head, None, weight), "images", None)
    _, logits, loss = program.run([images], labels)
    found = {"logits": logits, "loss": loss} | dict(net.named_buffers())
    return found | {f"{name}.grad": p.grad for name, p in net.named_parameters()}


def whole(net, images, labels):
    """The same by autograd, of the whole batch."""
    logits = net(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()} | dict(net.named_buffers())
    return found | {f"{name}.grad": p.grad for name, p in net.named_parameters()}


# ---- what the ranks do ----------------------------------------------------------------------------------------------


def bytes_of_a_step(net, images, labels):
    """(the peak without data, for which nothing may be sent; that of a step)."""
    without = meta_copy(net)
    body, head, _ = nodes_of(without, True)
    program = build(join(body, head, None), "images", None)
    given = images.to("meta"), labels.to("meta"), tensors_of(without)
    line, _ = timeline(program, *given, count_input=False, images=images.to("meta"))
    body, head, _ = nodes_of(net, True)
    program = build(join(body, head, None), "images", None)
    # gloo's own thread lets go of a message, of 64 bytes here, now and then a moment after it has come.
    return line.peak, min(measured_peak(program, net, images, labels) for _ in range(4))


def measured_peak(program, net, images, labels):
    with torch.no_grad(), LiveBytes([images, labels, *tensors_of(net)]) as live:
        base = live.now
        program.run([images], labels)
    net.zero_grad()
    return live.peak - base


def planned():
    """What plans tell of modules and bytes: with the option, and of a model with nn.SyncBatchNorms."""
    for model, option in (models.CifarResNet(1), True), (SYNC.convert_sync_batchnorm(models.CifarResNet(1)), False):
        made = plan(model, (4, 3, 16, 16), modules=2, auxiliary="light", sync_batch_norm=option)
        yield [(module.aux_net, module.aux_parameters, module.macs) for module in made.modules]


def work(rank, folder):
    store = distributed.FileStore(str(folder / "store"), len(RANKS))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(RANKS), timeout=timedelta(seconds=30))
    try:
        images, labels = batch()
        own = slice(*RANKS[rank])
        images, labels, share = images[own], labels[own], (own.stop - own.start) / len(images)
        found = {}
        for name in NETS:
            net, option = made(name)
            found[name] = step(net, option, images.clone(), labels, share)
        if rank == 0:  # alone: a plan that sent something would wait for ever
            found["planned"] = list(planned())
        found["bytes"] = bytes_of_a_step(made("residual and ReLU")[0], images.clone(), labels)
        found["group"] = by_itself(rank, images, labels)
        found["trained"] = trained(images, labels)
        torch.save(found, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def by_itself(rank, images, labels):
    """A step in a group of this rank alone, by an nn.SyncBatchNorm of it."""
    groups = [distributed.new_group([one]) for one in range(len(RANKS))]
    net, _ = made("SyncBatchNorm")
    for part in net.modules():
        if isinstance(part, SYNC):
            part.process_group = groups[rank]
    assert meta_copy(net).body[1][1].process_group is groups[rank]
    return step(net, False, images.clone(), labels)


def trained(images, labels):
    """The buffers of a model after one step of a trainer."""
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    trainer = LocalTrainer(model, modules=2, auxiliary="light", sync_batch_norm=True)
    trainer.step(images, labels)
    return dict(model.named_buffers())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    running = [processes.begun(work, rank, folder) for rank in range(len(RANKS))]
    for process in running:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in running] == [0] * len(RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(RANKS))]


# ---- two ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_two_ranks_are_the_whole_batch(name, ranks):
    found, expected = [one[name] for one in ranks], whole(made(name)[0], *batch())
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([one["logits"] for one in found]), expected["logits"], **close)
    for key, value in expected.items():
        if key.endswith((".grad", "loss")):  # each rank's are of its own images
            torch.testing.assert_close(found[0][key] + found[1][key], value, **close, msg=key)
        elif key != "logits":  # statistics are everybody's
            torch.testing.assert_close(found[0][key], value, **close, msg=key)
            assert torch.equal(found[0][key], found[1][key])


def test_a_group_of_one_is_by_itself(ranks):
    for (start, stop), one in zip(RANKS, ranks, strict=True):
        images, labels = (t[start:stop] for t in batch())
        expected = whole(made("SyncBatchNorm")[0], images, labels)
        for key, value in expected.items():
            torch.testing.assert_close(one["group"][key], value, rtol=1e-12, atol=1e-12, msg=key)


def test_plans_send_nothing_and_count_what_is_sent(ranks):
    assert ranks[0]["planned"] == list(planned())
    for one in ranks:
        without_data, measured = one["bytes"]
        assert without_data == measured > 0


def test_a_trainers_statistics_are_those_of_all_ranks(ranks):
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    LocalTrainer(model, modules=2, auxiliary="light").step(*batch())
    for name, buffer in model.named_buffers():
        for one in ranks:
            torch.testing.assert_close(one["trained"][name], buffer, rtol=1e-10, atol=1e-10, msg=name)


# ---- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_alone_it_is_what_it_is_without_the_option(name):
    found, expected = (step(made(name)[0], option, *batch()) for option in (True, False))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=key)


def test_what_the_option_stands_in_for():
    kinds = {}
    for name in ("max-pool", "last", "of tokens", "of rows"):
        for option in (False, True):
            body, head, out = nodes_of(made(name)[0], option)
            nodes = join(body[:-1] if name == "last" else body, head, None)
            kinds[name, option] = [type(node) for node in nodes]
    assert PooledNorm in kinds["max-pool", False] and SyncNorm in kinds["max-pool", True]
    assert (
        SyncNorm in kinds["of tokens", True]
        and SyncNorm in kinds["of rows", True]
        and Island in kinds["of rows", False]
    )
    for name, option in kinds:
        assert (SyncNorm in kinds[name, option]) == option
        assert not option or not {Norm, PooledNorm} & set(kinds[name, option])


def test_a_head_takes_in_no_synchronised_norm():
    torch.manual_seed(0)
    net = Net(nn.Tanh())
    net.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for option, taken in ((False, True), (True, False)):
        body, head, _ = nodes_of(net, option)
        nodes = join(body, head, None)
        assert isinstance(nodes[-1], Head) == taken and any(type(node) is SyncNorm for node in nodes) == option


def test_statistics_combine_whatever_each_rank_has():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(13, 3, generator=generator, dtype=torch.float64) + 1e3
    rows = []
    for part in values[:4], values[4:4], values[4:]:
        mean = part.mean(0) if len(part) else torch.zeros(3, dtype=torch.float64)
        rows.append(torch.cat([mean, (part - mean).square().sum(0), torch.tensor([float(len(part))])]))
    mean, var, count = combined(torch.stack(rows))
    torch.testing.assert_close(mean, values.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(var, values.var(0, correction=0), rtol=1e-11, atol=0)
    assert count == 13


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
def test_what_cannot_be_synchronised_is_named(settings):
    net = Net(nn.BatchNorm2d(4, **settings))
    nodes_of(net, False)
    nodes_of(net.eval(), True)
    with pytest.raises(
        ValueError, match=r"cannot synchronise the layer of 1 \(BatchNorm2d\), BatchNorm2d\(4.*leave sync"
    ):
        nodes_of(net.train(), True)


def test_a_plan_keeps_it_and_a_trainer_takes_it_from_there():
    model = models.CifarResNet(1)
    planned = plan(model, (4, 3, 16, 16), modules=2, auxiliary="light", sync_batch_norm=True)
    assert planned.origin.sync_batch_norm and LocalTrainer(model, plan=planned).sync_batch_norm
    with pytest.raises(ValueError, match="plan= tells .* sync_batch_norm"):
        LocalTrainer(model, plan=planned, sync_batch_norm=True)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    own = copy.deepcopy(model)
    trainer = LocalTrainer(model, plan=planned)
    with LiveBytes([images, labels, *tensors_of(model), *tensors_of(trainer.aux_nets)]):
        trainer.step(images, labels)
    torch.manual_seed(0)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="saved with sync_batch_norm True, this trainer has False"):
        LocalTrainer(own, modules=2, auxiliary="light").load_state_dict(state)
