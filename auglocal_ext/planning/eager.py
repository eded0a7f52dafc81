"""What plain PyTorch would hold for the same step: eager backpropagation, and with every unit checkpointed."""

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..common.memory import LiveBytes, bytes_of, tensors_of
from ..common.meta import meta_copy
from ..engine.as_real import RealLayouts
from ..engine.meta_attention import MetaAttention

__all__ = ["eager_bytes"]


def eager_bytes(planner, shape, like=None):
    """Bytes of one training step at its peak, everything in it, counted on meta tensors.

    Args:
        planner: `Planner` of the model.
        shape: of the batch, (N, C, H, W).
        like: see `Planner.batch`.

    Returns:
        {"bp": eager backpropagation, "gc": each unit behind the stem checkpointed (use_reentrant=False)}

    The count watches autograd, which then joins two gradients out of place: where that happens at the peak, which it
    does with checkpoints only, the figure is one feature map too high.
    """
    parts = nn.ModuleList([*(unit.module for unit in planner.backbone.units), planner.backbone.classifier])
    # In the dtype of the features as a whole: autocast does not know meta tensors.
    parts = meta_copy(parts).to(planner.autocast or planner.dtype)
    constant, (_, scratch) = planner.state_bytes(), planner.optimizer_bytes(planner.model)
    scratch = max(scratch, planner.stepping.clip_scratch(planner.model.parameters()))
    images, labels = planner.batch(shape, like)
    # When the optimizer steps, all gradients and what it needs for a moment are there, and the batch.
    end = bytes_of([images, labels]) + scratch
    if not planner.stepping.accumulates:  # else they are there all the time
        end += bytes_of(p for p in planner.model.parameters() if p.requires_grad)
    return {
        name: constant + max(end, _step(planner, parts, images, labels, checkpointed))
        for name, checkpointed in (("bp", False), ("gc", True))
    }


def _step(planner, parts, images, labels, checkpointed):
    planner.progress.walked()
    *units, classifier = parts
    trained = [p for p in parts.parameters() if p.requires_grad] if planner.stepping.accumulates else []
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with (
        LiveBytes([*tensors_of(parts), *planner.criterion.tensors, *(p.grad for p in trained)]) as live,
        RealLayouts(),
        MetaAttention(),
        torch.enable_grad(),
    ):
        existing = live.now
        live.count(images)
        live.count(labels)
        x = images.to(planner.autocast or planner.dtype)
        for index, unit in enumerate(units):
            x = checkpoint(unit, x, use_reentrant=False, context_fn=_contexts) if checkpointed and index else unit(x)
        loss = planner.criterion(classifier(x), labels)
        del x
        if loss.requires_grad:  # else everything is frozen
            loss.backward()
    parts.zero_grad(set_to_none=True)
    return live.peak - existing


def _contexts():
    """Of a checkpointed unit's first run and its second one, which is in the backward and outside of all modes."""
    return contextlib.nullcontext(), MetaAttention()
