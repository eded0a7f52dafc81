"""Some of timm's models, of other layers than torchvision's: a step of each. They run where timm is installed."""

import pytest
import torch
from test_torchvision import check_a_step
from torch import nn

from auglocal_ext import models

# A side of images that each takes.
NAMES = {
    "convnext_pico_ols": 64,
    "efficientnet_lite0": 64,
    "efficientvit_m0": 224,
    "hgnetv2_b3": 64,
    "lcnet_100": 64,
    "lowformer_e1": 64,
    "mixnet_s": 64,
    "regnety_006": 64,
    "test_maxvit": 160,
    "vit_dpwee_patch16_reg1_gap_256": 256,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_each(name):
    pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    model = models.create(f"timm:{name}", 10).double()
    for module in model.modules():  # without what is drawn at random in a step
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    check_a_step(model, NAMES[name], depth=2, auxiliary="light", modules=2)
