"""What plain PyTorch would hold for the same step: eager backpropagation, and with every unit checkpointed."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ._meta import meta_copy
from .backbone import as_backbone
from .engine.as_real import RealLayouts
from .memory import LiveBytes

__all__ = ["eager_bytes"]


def eager_bytes(planner, shape):
    """Bytes of one training step at its peak, everything in it, counted on meta tensors.

    Args:
        planner: `plan.Planner` of the model.
        shape: of the batch, (N, C, H, W).

    Returns:
        {"bp": eager backpropagation, "gc": each unit behind the stem checkpointed (use_reentrant=False)}

    The count watches autograd, which then joins two gradients out of place: where that happens at the peak, which it
    does with checkpoints only, the figure is one feature map too high.
    """
    constant = planner.state_bytes()
    return {"bp": constant + _step(planner, shape, False), "gc": constant + _step(planner, shape, True)}


def _step(planner, shape, checkpointed):
    dtype = planner.autocast or planner.dtype
    model = meta_copy(planner.model).to(dtype)  # autocast does not know meta tensors
    backbone = as_backbone(model).without_hooks()
    images, labels = planner.batch(shape)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, RealLayouts(), torch.enable_grad():
        existing = live.now
        live.count(images)
        live.count(labels)
        x = images.to(dtype)
        for index, unit in enumerate(backbone.units):
            x = checkpoint(unit.module, x, use_reentrant=False) if checkpointed and index else unit.module(x)
        loss = F.cross_entropy(backbone.classifier(x), labels)
        del x
        loss.backward()
    return live.peak - existing
