"""LayerNorm: torchvision's of channels, what autocast makes of it, and what the meta device answers of it."""

import copy

import pytest
import torch
from torch import nn

from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.as_real import RealLayouts
from auglocal_ext.engine.nodes import Island, LayerNorm, Reshape
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace

LAYOUTS = [torch.contiguous_format, torch.channels_last]
HEAD = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def program_of(module, **options):
    nodes, out = trace(module, set(), "body", "images")
    logits, _ = trace(HEAD, set(), "head", out)
    return build(join(nodes, logits, None), "images", None, **options), nodes


def convnext_block(torchvision):
    """Of a ConvNeXt, without its shortcut."""
    permute, norm = torchvision.ops.Permute, torchvision.models.convnext.LayerNorm2d
    return nn.Sequential(
        norm(3), nn.Conv2d(3, 4, 1), permute([0, 2, 3, 1]), nn.LayerNorm(4), nn.Linear(4, 16), nn.GELU(),
        nn.Linear(16, 4), permute([0, -1, 1, 2]), norm(4, eps=0.1), nn.Conv2d(4, 5, 1),
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convnext_block_is_autograds(torchvision, layout):
    module = convnext_block(torchvision).double()
    program, nodes = program_of(module)
    assert not any(isinstance(node, Island) for node in nodes)
    assert sum(isinstance(node, LayerNorm) for node in nodes) == 3 == 1 + sum(isinstance(n, Reshape) for n in nodes)
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)
    labels, own = torch.tensor([0, 4]), copy.deepcopy(module)
    _, logits, loss = program.run([images.clone()], labels)
    expected = HEAD(own(images))
    torch.testing.assert_close(logits, expected)
    nn.functional.cross_entropy(expected, labels).backward()
    for parameter, other in zip(module.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_convnext_blocks_bytes_are_planned(torchvision, layout, autocast):
    module = convnext_block(torchvision)
    images, labels = torch.randn(2, 3, 6, 5).contiguous(memory_format=layout), torch.tensor([0, 4])
    without = meta_copy(module)
    walked, _ = program_of(without, autocast=autocast)
    line, _ = timeline(walked, images.to("meta"), labels.to("meta"), tensors_of(without), count_input=False)
    program, _ = program_of(module, autocast=autocast)
    with torch.no_grad(), LiveBytes([images, labels, *tensors_of(module)]) as live:
        base = live.now
        kept = program.run([images], labels)
        assert live.peak - base == line.peak
    del kept


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_autocast_computes_it_in_float32_on_cuda(device_type):
    norm = nn.LayerNorm(6).to("meta")
    nodes, _ = trace(norm, set(), "body", "images")
    program = build(join([], nodes, None), "images", None, autocast=torch.bfloat16, device_type=device_type)
    step = next(step for step in program.steps if step.kind == "layer norm")
    out, mean, _ = step.run(torch.empty(2, 6, dtype=torch.bfloat16, device="meta"))
    assert out.dtype == (torch.float32 if device_type == "cuda" else torch.bfloat16) and mean.dtype == torch.float32


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_the_meta_device_answers_as_a_cpu(dtypes, affine, order, count):
    x = torch.randn(2, 3, 4, 5).to(dtypes[0]).permute(order)
    shape = x.shape[-count:]
    parameters = [torch.ones(shape, dtype=dtypes[1]) if given else None for given in affine]

    def answers(x, parameters):
        made = torch.ops.aten.native_layer_norm(x, shape, *parameters, 1e-5)
        given = torch.empty_like(made[0]), x, shape, made[1], made[2], *parameters, (True, *affine)
        made = (*made, *torch.ops.aten.native_layer_norm_backward(*given))
        return [None if t is None else (t.shape, t.dtype, t.stride()) for t in made]

    expected = answers(x, parameters)
    with RealLayouts():
        assert answers(x.to("meta"), [p if p is None else p.to("meta") for p in parameters]) == expected
