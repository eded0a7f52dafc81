"""torchvision's transformers and ConvNeXt, read whole: autograd's gradients, a real run's bytes, and what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import looked_into
from torch import nn

from auglocal_ext import LocalTrainer, plan
from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.as_real import RealLayouts
from auglocal_ext.engine.meta_attention import MetaAttention
from auglocal_ext.engine.nodes import Island
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace

NAMES = ["vit", "swin", "swin_v2", "convnext", "maxvit"]


def made(models, name, width=1):
    if name == "vit":
        return models.VisionTransformer(16, 4, 2, 2, 16 * width, 32 * width, num_classes=5)
    if name == "swin":
        given = [4, 4], 8 * width, [2, 1], [2, 2], [2, 2]
        return models.SwinTransformer(*given, stochastic_depth_prob=0.0, num_classes=5)
    if name == "swin_v2":
        kinds = models.swin_transformer
        given = [4, 4], 8 * width, [2, 1], [2, 2], [3, 3]
        options = dict(block=kinds.SwinTransformerBlockV2, downsample_layer=kinds.PatchMergingV2)
        return models.SwinTransformer(*given, stochastic_depth_prob=0.0, num_classes=5, **options)
    if name == "convnext":
        config = models.convnext.CNBlockConfig
        return models.ConvNeXt([config(8 * width, 16 * width, 2), config(16 * width, None, 1)], num_classes=5)
    given = dict(stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1], head_dim=4)
    return models.MaxVit((16, 16), **given, stochastic_depth_prob=0.0, num_classes=5)


def program_of(model, **options):
    nodes, _ = trace(model, looked_into(model), "model", "images")
    return build(join([], nodes, None), "images", None, **options), nodes


def batch(layout=torch.contiguous_format, dtype=torch.float32):
    images = torch.randn(3, 3, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    return images, torch.tensor([0, 4, 2])


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_a_step_is_autograds(torchvision, name):
    torch.manual_seed(0)
    model = made(torchvision.models, name).double()
    for parameter in model.parameters():  # layer scales and class tokens begin with next to nothing
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    own, (images, labels) = copy.deepcopy(model), batch(dtype=torch.float64)
    program, nodes = program_of(model)
    islands = {node.what for node in nodes if isinstance(node, Island)}
    assert islands <= {"model: expand"} or name == "maxvit"
    _, logits, _ = program.run([images.clone()], labels)
    expected = own(images)
    torch.testing.assert_close(logits, expected)
    F.cross_entropy(expected, labels).backward()
    for (path, parameter), other in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-11, msg=path)


def test_bf16_errs_no_more_than_eager_torch(torchvision, name):
    torch.manual_seed(0)
    model = made(torchvision.models, name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    eager, exact, (images, labels) = copy.deepcopy(model), copy.deepcopy(model).double(), batch()
    images = images.bfloat16()
    program_of(model, autocast=torch.bfloat16)[0].run([images.clone()], labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = eager(images.float())
    F.cross_entropy(out.float(), labels).backward()
    F.cross_entropy(exact(images.double()), labels).backward()
    errors, allowed = [], []
    for ours, theirs, true in zip(model.parameters(), eager.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        errors.append(((ours.grad - true.grad).norm() / (true.grad.norm() + 1e-12)).item())
        allowed.append(((theirs.grad - true.grad).norm() / (true.grad.norm() + 1e-12)).item())
    errors, allowed = torch.tensor(errors), torch.tensor(allowed)
    assert errors.median() <= 1.5 * allowed.median() and (errors <= 4 * allowed + 0.05).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_bytes_without_data_are_those_of_a_run(torchvision, name, layout, autocast):
    model, (images, labels) = made(torchvision.models, name), batch(layout)
    without = meta_copy(model)
    walked, _ = program_of(without, autocast=autocast)
    x = torch.empty_like(images, device="meta")
    line, _ = timeline(walked, x, labels.to("meta"), tensors_of(without), count_input=False, images=x)
    program, _ = program_of(model, autocast=autocast)
    with torch.no_grad(), LiveBytes([images, labels, *tensors_of(model)]) as live:
        base = live.now
        kept = program.run([images], labels, images)
        assert live.peak - base == line.peak
    del kept


def test_a_cut_model_is_read_as_well(torchvision, name):
    """In units, what one node describes whole is one step still: attention in windows, the merging of patches."""
    torch.manual_seed(0)
    model, (images, labels) = made(torchvision.models, name), batch(torch.channels_last)
    expected = F.cross_entropy(copy.deepcopy(model)(images), labels).item()
    trainer = LocalTrainer(model, rule="bp")
    assert trainer.step(images, labels).loss.item() == pytest.approx(expected, rel=1e-4)
    islands = trainer.plan.modules[0].islands
    assert all("expand" in island or "Sigmoid" in island or "Tanh" in island for island in islands)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert live.peak == trainer.plan.peak_bytes


def test_eager_torch_is_counted_beside_it(torchvision, name):
    """Also with every unit checkpointed, whose second run takes the same kernels as the first."""
    compared = plan(made(torchvision.models, name, 4), (64, 3, 16, 16), rule="bp").comparison
    assert compared.bp.bytes < compared.eager.bytes and compared.eager_checkpoint.bytes < compared.eager.bytes


def test_what_is_kept_is_a_part_of_what_autograd_saves(torchvision, name):
    limits = {"vit": 0.7, "swin": 0.66, "swin_v2": 0.55, "convnext": 0.6, "maxvit": 0.5}
    model = meta_copy(made(torchvision.models, name, 4))
    images, labels = (x.to("meta") for x in batch())
    with LiveBytes([images, labels, *tensors_of(model)]) as live, RealLayouts(), MetaAttention(), torch.enable_grad():
        before = live.now
        loss = F.cross_entropy(model(images), labels)
        saved = live.now - before
    del loss
    line, _ = timeline(program_of(model)[0], images, labels, tensors_of(model), count_input=False)
    assert line.kept < limits[name] * saved
