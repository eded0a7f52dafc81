"""The default optimizer and schedule."""

import math

import pytest
import torch

from auglocal_ext.optim import constant, cosine, sgd


def test_sgd_is_the_papers():
    optimizer = sgd(1024)([torch.zeros(1, requires_grad=True)])
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.8)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)


def test_cosine_with_warm_up():
    assert cosine(0, 100) == pytest.approx(0.01)
    assert cosine(5, 100) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)) + 0.5 * 0.01)
    assert cosine(10, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert cosine(50, 100) == pytest.approx(0.5)
    assert cosine(100, 100) == pytest.approx(0)
    assert cosine(10, 400) == cosine(10, 400) > 0.99  # the warm-up is at most 10 epochs
    assert cosine(0.5, 5) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))


def test_constant():
    assert constant(3, 5) == 1.0
