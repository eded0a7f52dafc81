"""Attention in windows: Swin's blocks and MaxViT's whole, and what stays an island."""

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import looked_into
from torch import nn

from auglocal_ext.common.memory import MultiplyAccumulates
from auglocal_ext.engine.nodes import Island, WindowAttention
from auglocal_ext.engine.program import build
from auglocal_ext.engine.trace import join, trace


def swin(torchvision, version=1, **options):
    models = torchvision.models.swin_transformer
    block = models.SwinTransformerBlock if version == 1 else models.SwinTransformerBlockV2
    return nn.Sequential(torchvision.ops.Permute([0, 2, 3, 1]), block(8, 2, [3, 2], [1, 1], **options))


def maxvit(torchvision, **options):
    given = dict(attention_dropout=0.0, mlp_dropout=0.0, p_stochastic_dropout=0.0) | options
    layer = torchvision.models.maxvit.PartitionAttentionLayer
    return layer(8, 4, 2, "grid", (4, 4), 2, nn.GELU, nn.LayerNorm, **given)


@pytest.mark.parametrize("kind", ["swin", "swin_v2", "maxvit"])
def test_a_block_is_autograds(torchvision, kind):
    torch.manual_seed(0)
    made = {
        "swin": lambda: swin(torchvision),
        "swin_v2": lambda: swin(torchvision, 2),
        "maxvit": lambda: maxvit(torchvision),
    }
    body = nn.Sequential(nn.Conv2d(3, 8, 1), made[kind]()).double()
    for name, parameter in body.named_parameters():
        if "table" in name or "cpb" in name:
            nn.init.normal_(parameter)
    own = copy.deepcopy(body)
    size = {"swin": (5, 7), "swin_v2": (4, 6)}.get(kind, (4, 4))
    images, labels = torch.randn(3, 3, *size, dtype=torch.float64), torch.tensor([0, 2, 1])
    head = nn.Flatten(1)
    nodes, out = trace(body, looked_into(body), "body", "images")
    assert sum(isinstance(node, WindowAttention) for node in nodes) == 1
    assert not any(isinstance(node, Island) for node in nodes)
    logits, _ = trace(head, set(), "head", out)
    _, found, _ = build(join(nodes, logits, None), "images", None).run([images.clone()], labels)
    expected = head(own(images))
    torch.testing.assert_close(found, expected)
    F.cross_entropy(expected, labels).backward()
    for (name, parameter), other in zip(body.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    # V2 has no bias of its keys: its gradient is none, not small.
    if kind == "swin_v2":
        assert not body[1][1].attn.qkv.bias.grad[8:16].any()


def test_a_frozen_bias_gets_no_gradient(torchvision):
    body = swin(torchvision)
    body[1].attn.relative_position_bias_table.requires_grad_(False)
    nodes, out = trace(body, looked_into(body), "body", "images")
    logits, _ = trace(nn.Flatten(1), set(), "head", out)
    program = build(join(nodes, logits, None), "images", None)
    program.run([torch.randn(2, 8, 4, 6)], torch.tensor([0, 1]))
    trained = {parameter for parameter in body.parameters() if parameter.requires_grad}
    assert set(program.gradients.values()) == trained and len(trained) == len(list(body.parameters())) - 1
    assert body[1].attn.relative_position_bias_table.grad is None


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"attention_dropout": 0.1}])
def test_dropout_makes_an_island(torchvision, options):
    body = swin(torchvision, **options)
    nodes, _ = trace(body, looked_into(body), "body", "images")
    assert [node.what for node in nodes if isinstance(node, Island)] == ["1.attn (ShiftedWindowAttention)"]


def test_a_changed_bias_makes_an_island(torchvision):
    body = swin(torchvision, 2)
    body[1].attn.cpb_mlp[1] = nn.GELU()
    nodes, _ = trace(body, looked_into(body), "body", "images")
    assert [node.what for node in nodes if isinstance(node, Island)] == ["1.attn (ShiftedWindowAttentionV2)"]


def test_another_function_in_place_of_torchvisions_makes_an_island(torchvision, monkeypatch):
    models, body = torchvision.models.swin_transformer, swin(torchvision)
    monkeypatch.setattr(models, "shifted_window_attention", lambda x, *_args, **_options: 2 * x)
    nodes, _ = trace(body, looked_into(body), "body", "images")
    assert [node.what for node in nodes if isinstance(node, Island)] == ["1.attn (ShiftedWindowAttention)"]


@pytest.mark.parametrize("kind", ["swin", "swin_v2", "maxvit"])
def test_its_arithmetic_is_what_its_operators_count(torchvision, kind):
    """On meta tensors a part of the images stands for all of them."""
    body = {"swin": swin, "swin_v2": lambda tv: swin(tv, 2), "maxvit": maxvit}[kind](torchvision)
    nodes, out = trace(body, looked_into(body), "body", "images")
    logits, _ = trace(nn.Flatten(1), set(), "head", out)
    program = build(join(nodes, logits, None), "images", None)
    values = {"images": torch.randn(9, 8, 4, 4), "labels": torch.arange(9)}
    compared = 0
    with torch.no_grad():
        for step in program.steps:
            reads = [values[name] for name in step.reads]
            with MultiplyAccumulates() as counted:
                made = step.run(*reads)
            made = (made,) if len(step.writes) == 1 else made
            if step.kind.startswith("attention") and step.macs is not None:
                assert step.macs(reads, made) == counted.count, step.kind
                compared += 1
            values.update(zip(step.writes, made, strict=True))
    assert compared == 2
