"""Ranks: what they compare, average and tell each other, and what the others hear of one that fails."""

import os
import pickle
import time
from datetime import timedelta

import pytest
import torch
from ranks import Raised, free_ports, together
from torch import nn

from auglocal_ext.distributed import agree, faults, group
from auglocal_ext.distributed.agree import check_alike, exchange
from auglocal_ext.distributed.collectives import broadcast, gathered, highest, summed
from auglocal_ext.distributed.faults import RankFailed, answering, telling
from auglocal_ext.distributed.reduction import Reduction, flatten


def test_alone_nothing_is_sent():
    assert group.world() == group.World(0, range(1)) and group.world().alone and group.world().first
    value = torch.arange(3.0)
    broadcast([value], "weights")
    assert summed(value, "sums") is value and highest([2, 1], "numbers") == [2, 1] and gathered("a", "texts") == ["a"]
    check_alike({"depth": 2})
    with pytest.raises(ValueError, match="plain"), telling():
        raise ValueError("plain")
    with pytest.raises(RuntimeError, match="plain") as found, answering("nobody"):
        raise RuntimeError("plain")
    assert found.type is RuntimeError


# ---- gradients -------------------------------------------------------------------------------------------------------


def layers():
    torch.manual_seed(3)
    made = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(5, 2)]).to(memory_format=torch.channels_last)
    odd = nn.Parameter(torch.randn(6, 4)[:, ::2])  # which does not lie densely
    made.register_parameter("odd", odd)
    made.register_parameter("unused", nn.Parameter(torch.randn(3)))
    return made


def with_gradients(module, seed):
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.grad = None if name == "unused" else torch.randn_like(parameter)
    return [p.grad for p in module.parameters()]


def test_gradients_become_views_of_one_tensor_in_their_parameters_order():
    module = layers()
    before = [None if g is None else g.clone() for g in with_gradients(module, 0)]
    held = [p for p in module.parameters() if p.grad is not None]
    flat = flatten(held)
    assert flat.shape == (sum(p.numel() for p in held),)
    for parameter, expected in zip(module.parameters(), before, strict=True):
        assert expected is None or torch.equal(parameter.grad, expected)
    assert module[0].weight.grad.stride() == module[0].weight.stride() == (27, 1, 9, 3)
    assert module.odd.grad.is_contiguous() and module.unused.grad is None
    flat.zero_()
    assert all(not p.grad.any() for p in held)
    again = flatten(held)
    assert again.data_ptr() == flat.data_ptr() and again.shape == flat.shape
    held[0].grad = torch.ones_like(held[0])
    assert flatten(held).data_ptr() != flat.data_ptr() and held[0].grad.all()


def test_a_pending_reduction_is_not_copied():
    reduction = Reduction()
    reduction._pending.append((0, None, None))
    assert pickle.loads(pickle.dumps(reduction)).pending == []


# ---- several ranks ---------------------------------------------------------------------------------------------------


def everything(folder):
    """What goes well, in one start of the processes."""
    place, found = group.world(), {}
    found["place"] = (place.rank, place.size, place.alone, place.first, group.timeout().total_seconds())
    found["texts"] = exchange(f"I am {place.rank}", "a greeting")
    check_alike({"depth": 2, "shape": (1, 2)})
    for name, value in (("depth", place.rank), ("a long one", "x" * 100 + str(place.rank))):
        try:
            check_alike({"same": 1, name: value}, "give the same")
        except ValueError as error:
            found[name] = str(error)
    weight = torch.full((2, 3, 2, 2), float(place.rank)).to(memory_format=torch.channels_last)
    flags = torch.tensor(place.rank, dtype=torch.int16)
    broadcast([weight, torch.tensor(place.rank), flags, torch.empty(0)], "the weights")
    found["flags"] = flags.item()
    found["weight"] = weight.unique().tolist()
    found["sum"] = summed(torch.tensor([1, place.rank]), "sums").tolist()
    found["highest"] = highest([place.rank, -place.rank, 7], "numbers")
    found["gathered"] = gathered({"rank": place.rank}, "values")
    modules, reduction = [layers(), nn.Linear(2, 2), layers()], Reduction()
    with_gradients(modules[0], place.rank), with_gradients(modules[2], 10 + place.rank)
    for key, module in enumerate(modules):
        reduction.start(key, module.parameters())
    found["pending"] = reduction.pending
    found["waited"] = list(reduction.wait())
    found["count"], found["left"] = reduction.count, reduction.pending
    own = range(place.rank, place.rank + 1)
    with group.among(own):
        found["own"] = summed(torch.ones(1), "a sum").item(), gathered("alone", "values"), group.world().number
    try:
        with group.among(range(place.size)[::-1]):
            summed(torch.ones(1), "a sum")
    except RankFailed as error:
        found["no group"] = str(error)
    found["gradients"] = [[p.grad for p in module.parameters()] for module in modules]
    return found


def test_what_ranks_do_together(tmp_path):
    found = together(everything, tmp_path / "ranks", tmp_path)
    for rank, one in enumerate(found):
        assert one["place"] == (rank, 2, False, rank == 0, 5.0)
        assert one["texts"] == ["I am 0", "I am 1"] and one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["depth"] == "rank 1 has depth 1, rank 0 has 0: give the same"
        assert one["a long one"].startswith("rank 1 has a long one 'xxxx") and "... rank 0" not in one["a long one"]
        assert one["weight"] == [0.0] and one["flags"] == 0 and one["sum"] == [2, 1] and one["highest"] == [1, 0, 7]
        assert one["own"] == (1.0, ["alone"], rank)
        assert one["no group"].startswith("ranks 1, 0 have no connection 'training' any more, as when one has failed")
        assert one["pending"] == one["waited"] == [0, 1, 2] and one["count"] == 2 and one["left"] == []
        for index, seed in ((0, 0), (2, 10)):
            pairs = zip(with_gradients(layers(), seed), with_gradients(layers(), seed + 1), strict=True)
            for ours, (a, b) in zip(one["gradients"][index], pairs, strict=True):
                assert (ours is None) == (a is None)
                assert ours is None or torch.equal(ours, (a + b) / 2)
        assert one["gradients"][1] == [None, None]


class Noticed:
    """A store in which some ranks have said that they noticed something."""

    def __init__(self, *ranks):
        self.ranks = ranks

    def set(self, key, value):
        pass

    def check(self, keys):
        return any(keys[0].endswith(f"noticed/rank {rank}") for rank in self.ranks)

    def get(self, key):
        return b""


@pytest.mark.parametrize(
    ("ranks", "noticed", "expected"),
    [
        (range(1, 4, 2), (2,), "rank 3 ended in a sum"),  # rank 0 waits for this one, and has not heard of it
        (range(0, 2), (0, 2), "rank 3 ended in a sum"),  # none of those that this one works with
        (range(0, 4), (2,), "ranks 0, 3 ended in a sum"),
        (range(0, 4), (0, 2, 3), "the ranks lost their connection in a sum"),
    ],
)
def test_of_several_that_are_silent_it_is_one_that_this_rank_works_with(monkeypatch, ranks, noticed, expected):
    monkeypatch.setattr(faults, "everybody", lambda: group.World(1, range(4)))
    monkeypatch.setattr(faults, "world", lambda: group.World(ranks.index(1), ranks))
    monkeypatch.setattr(faults, "store", lambda: Noticed(*noticed))
    monkeypatch.setattr(faults, "timeout", lambda: timedelta(seconds=100))
    monkeypatch.setattr(faults, "GRACE", 0.05)
    assert faults._why("a sum", time.monotonic()).split(", and")[0] == expected


@pytest.mark.parametrize(
    ("noticed", "said"),
    [("", "ended in a greeting, and did not say why"), ("hangs", "did not answer for 100 s in a greeting")],
    ids=["gone", "hangs"],
)
def test_who_waits_for_a_text_hears_from_those_that_noticed_a_rank(monkeypatch, noticed, said):
    shared, place = torch.distributed.HashStore(), group.World(0, range(3))
    for module in (faults, agree):
        monkeypatch.setattr(module, "world", lambda: place)
        monkeypatch.setattr(module, "store", lambda: shared)
        monkeypatch.setattr(module, "timeout", lambda: timedelta(seconds=100))
    monkeypatch.setattr(faults, "everybody", lambda: place)
    monkeypatch.setattr(faults, "GRACE", 0.05)
    shared.set(faults._key("noticed", 2), noticed)
    with pytest.raises(RankFailed, match=f"^rank 1 {said}"):
        exchange("hello", "a greeting")


@telling()
def failing(how):
    """Rank 1 fails; rank 0 waits for it, in a reduction or in a comparison."""
    rank = group.world().rank
    waits = how.endswith("compared")
    if not waits:
        summed(torch.ones(1), "a first sum")
    began = time.monotonic()
    if rank == 1:
        if how.startswith("raises"):
            raise ValueError("labels must be right\nand a second line")
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "hangs":
            time.sleep(4)
            return None
    try:
        if waits:
            check_alike({"depth": 2})
        else:
            summed(torch.ones(1), "a sum")
    except RankFailed as error:
        return str(error), time.monotonic() - began
    return None


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raises", "rank 1 stopped: ValueError: labels must be right"),
        ("raises, compared", "rank 1 stopped: ValueError: labels must be right"),
        ("killed", "rank 1 ended in a sum, and did not say why, as a process that was killed"),
        ("hangs", "rank 1 did not answer for 1 s in a sum"),
    ],
)
def test_the_others_hear_of_a_rank_that_fails(tmp_path, how, expected):
    seconds = 1 if how == "hangs" else 5
    first, second = together(failing, tmp_path / "ranks", how, seconds=seconds)
    assert first[0] == expected and first[1] < 15
    if how.startswith("raises"):
        assert isinstance(second, Raised) and second.kind == "ValueError" and second.message.endswith("second line")


@telling()
def without_rank_0(compared):
    check_alike({"depth": 2})
    if group.world().first:
        time.sleep(0.5)  # until the other one has read the store
        os.kill(os.getpid(), 9)
    try:
        check_alike({"depth": 2}) if compared else summed(torch.ones(1), "a sum")
    except RankFailed as error:
        return str(error)


@pytest.mark.parametrize("compared", [True, False])
def test_the_others_hear_of_a_rank_that_is_gone_with_the_store(tmp_path, compared):
    first, second = together(without_rank_0, tmp_path / "ranks", compared, port=free_ports()[0])
    assert first is None and "ended in " in second and "did not say why" in second


def rounds():
    """After a failure that every rank has heard of, the next work is not told of it again."""
    for _ in range(2):
        try:
            with telling():
                if group.world().rank == 1:
                    raise ValueError("once")
                summed(torch.ones(1), "a sum")
        except (ValueError, RankFailed):
            pass
    with telling():
        check_alike({"depth": 2})
        return summed(torch.ones(1), "a sum").item()


def test_after_a_failure_ranks_can_begin_anew(tmp_path):
    assert together(rounds, tmp_path / "ranks") == [2.0, 2.0]
