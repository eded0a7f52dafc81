"""Times by a machine's speed in arithmetic and in memory."""

import pytest
import torch
from calibration_helpers import convolution, elementwise
from torch import nn

from auglocal_ext.optim import sgd
from auglocal_ext.planning.roofline import Roofline, measured_roofline


def test_an_instruction_takes_as_long_as_its_slower_part():
    step, reads, made, macs = convolution("conv", 4, 16, 64, 8)
    assert macs == 4 * 64 * 64 * 16 * 9 and reads[0].nbytes + made.nbytes == 4 * 64 * 4 * 80
    assert Roofline(1e9, 1e12)(step, reads, made, macs) == macs
    assert Roofline(1e15, 1e9)(step, reads, made, macs) == 4 * 64 * 4 * 80
    assert Roofline(1.0, 2e9)(*elementwise("norm", 2, 4)) == 2 * 16 * 16 * 4


def test_an_optimizers_step_is_memory_traffic():
    parameters = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(5), requires_grad=False)]
    assert Roofline(1.0, 1e9).optimizer(sgd(128), parameters, 40) == 3 * 40 + 2 * 40


def test_a_machine_is_measured():
    found = measured_roofline(torch.device("cpu"), "fp32")
    assert 1e8 < found.macs < 1e14 and 1e8 < found.bandwidth < 1e13


def test_it_is_measured_by_what_it_took(monkeypatch):
    monkeypatch.setattr("auglocal_ext.planning.roofline.median_seconds", lambda device, run, repeats: 0.5)
    found = measured_roofline(torch.device("cpu"), "fp32")
    assert found.macs == pytest.approx(2 * 8 * 128 * 28 * 28 * 128 * 9)
    assert found.bandwidth == 2 * 2 * 4 * 2**22
