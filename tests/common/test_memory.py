"""Counting live bytes."""

import pytest
import torch

from auglocal_ext.common.memory import LiveBytes, format_bytes


def test_peak_and_present():
    existing = torch.zeros(100)
    with LiveBytes([existing, existing[10:]]) as live:
        assert live.now == live.peak == 400
        a = torch.zeros(1000)
        b = a[:500].view(5, 100)  # a view holds no bytes of its own
        assert live.now == 4400
        c = a + 1
        assert live.now == live.peak == 8400
        del a
        assert live.now == 8400  # b keeps it alive
        del b, c
        assert live.now == 400 and live.peak == 8400
    assert torch.zeros(10**6).nbytes and live.peak == 8400  # off outside


def test_what_autograd_keeps_is_counted():
    x = torch.randn(64, 64, requires_grad=True)
    with LiveBytes([x]) as live:
        y = (x.exp() * 2).sum()  # exp's result is kept
        assert live.now == 2 * x.nbytes + 4
        y.backward()
        assert live.now == 2 * x.nbytes + 4  # the gradient instead of it


def test_meta_tensors_count_as_if_they_were_real():
    with LiveBytes() as live:
        held = torch.empty(10, 10, device="meta") + 1
    assert live.now == held.nbytes and live.peak == 2 * held.nbytes


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1234, "1.23 kB"), (5_670_000, "5.67 MB"), (32_530_000_000, "32.5 GB")]
)
def test_format(count, text):
    assert format_bytes(count) == text
