"""What an operator made without data is made again, at once, of tensors of the same form."""

import pytest
import torch

from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.engine import answers
from auglocal_ext.engine.as_real import RealLayouts

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(answers, "_known", {})


def x_of(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def form(made):
    """Of what an operator made: which tensors of it are whose, and what they are."""
    return [
        None if t is None else (t.shape, t.stride(), t.dtype) for t in (made if isinstance(made, tuple) else [made])
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: aten.add.Tensor(x, x[:1]),
        lambda x: aten.mm.default(x, x.t()),
        lambda x: aten.cat.default([x, x.t().contiguous().t()], 1),
        lambda x: aten.native_layer_norm.default(x, [6], None, None, 1e-5),
        lambda x: aten.max.dim(x, 1),
        lambda x: aten.convolution_backward.default(
            x_of(2, 5, 4, 4), x_of(2, 3, 4, 4), x_of(5, 3, 1, 1), [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [False, True, False],
        ),
        lambda x: aten.empty_like.default(x.t(), dtype=torch.float64),
    ],
)  # fmt: skip
def test_an_answer_is_remembered_as_new_tensors(call, monkeypatch):
    ran, run = [], RealLayouts._run
    monkeypatch.setattr(RealLayouts, "_run", lambda *given: (ran.append(given[1]), run(*given))[1])
    with RealLayouts():
        first = call(x_of(6, 6))
        asked_first = ran[-1]
        ran.clear()
        again, other = call(x_of(6, 6)), call(x_of(6, 6))
    assert asked_first not in ran
    assert type(first) is type(again)
    assert form(first) == form(again) == form(other)
    storages = [t.untyped_storage()._cdata for made in (again, other) for t in flat(made)]
    assert len(set(storages)) == len(storages)


def flat(made):
    return [t for t in (made if isinstance(made, tuple) else [made]) if t is not None]


def test_what_is_written_over_is_given_back():
    for _ in range(2):
        x, out = x_of(4, 5), x_of(4, 5)
        with RealLayouts():
            assert x.add_(1) is x
            assert torch.add(x, 1, out=out) is out
    assert len(answers._known) == 2


def test_numbers_of_other_types_and_other_strides_are_other_questions():
    with RealLayouts():
        for _ in range(2):
            assert (x_of(3, dtype=torch.int64) + 1).dtype == torch.int64
            assert (x_of(3, dtype=torch.int64) + 1.0).dtype == torch.float32
            assert (x_of(3, dtype=torch.int64) + True).dtype == torch.int64
            assert (x_of(4, 6) * 2).stride() == (6, 1)
            assert (x_of(6, 4).t() * 2).stride() == (1, 4)


def test_views_and_changes_of_form_are_never_remembered():
    for _ in range(2):
        x, out = x_of(4, 5), x_of(0)
        with RealLayouts():
            same = aten._unsafe_view.default(x, [20])
            assert x.view(20).untyped_storage()._cdata == same.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.t_().shape == (5, 4)
            assert torch.add(x, x, out=out).shape == out.shape == (5, 4)
    assert not answers._known


def test_values_and_tensors_with_data_are_never_remembered():
    x = torch.rand(3)
    with RealLayouts():
        torch.testing.assert_close(x + 1, x.add(1))
        assert (x_of(3) * torch.tensor(2.0)).shape == (3,)
        assert x_of(1).item() == 1
    assert not answers._known


def test_bytes_are_counted_the_same():
    peaks = []
    for _ in range(2):
        x = x_of(8, 4)
        with LiveBytes([x]) as live, RealLayouts():
            y = (x @ x.t()).softmax(1)
            del y
        peaks.append((live.peak, live.now))
    assert peaks == [(8 * 4 * 4 + 2 * 8 * 8 * 4, 8 * 4 * 4)] * 2


def test_no_more_is_remembered_than_a_bound(monkeypatch):
    monkeypatch.setattr(answers, "MOST", 3)
    with RealLayouts():
        for size in range(1, 9):
            x_of(size).exp()
    assert 1 <= len(answers._known) <= 3
