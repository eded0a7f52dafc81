"""The local step: isolation, memory, optimizers, values against plain torch, and bad batches."""

import contextlib
import copy
import warnings
from functools import partial

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, assert_isolated, models
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.engine.program import Program

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.fixture
def trainer(tiny_model):
    return LocalTrainer(tiny_model, depth=2)  # stem | layer1.0 | layer2.0 + layer3.0


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_each_loss_reaches_its_own_module_and_nothing_else(trainer, batch):
    parameters = [p.clone() for p in trainer.model.parameters()]
    assert_isolated(trainer, *batch)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("options", [{"form": "imagenet"}, {"modules": 3}, {"rule": "bp"}])
def test_isolation_of_other_cuts(tiny_model, batch, options):
    assert_isolated(LocalTrainer(tiny_model, depth=3, **options), *batch)


def test_a_leak_between_modules_is_found(trainer, batch, monkeypatch):
    backward = trainer.backward

    def leaky(index, features, labels, images):
        result = backward(index, features, labels)
        if index == 1:
            for parameter in trainer.local_modules[0].body.parameters():
                parameter.grad = torch.ones_like(parameter)
        return result

    monkeypatch.setattr(trainer, "backward", leaky)
    with pytest.raises(
        AssertionError, match="local module 1 reaches, or misses, .*: bn1.bias, bn1.weight, conv1.weight"
    ):
        assert_isolated(trainer, *batch)


def plain_step(model, aux_nets, cuts, images, labels):
    """The step written out in plain torch, with the sum of nothing: one backward and one SGD step a module."""
    units = [nn.Sequential(model.conv1, model.bn1, nn.ReLU()), *model.layer1, *model.layer2, *model.layer3]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    losses, features = [], images
    for part, head in zip(cuts, [*aux_nets, classifier], strict=True):
        body = nn.Sequential(*units[part.first : part.last + 1])
        optimizer = SGD([*body.parameters(), *head.parameters()])
        optimizer.zero_grad()
        features = body(features)
        loss = F.cross_entropy(head(features), labels)
        loss.backward()
        optimizer.step()
        features = features.detach()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_step_is_the_plain_step(tiny_model, batch):
    model = tiny_model.double()
    images, labels = batch[0].double(), batch[1]
    trainer = LocalTrainer(model, depth=2, optimizer=SGD)
    twin, twin_nets = copy.deepcopy(model), copy.deepcopy(trainer.aux_nets)
    result = trainer.step(images, labels)
    expected = plain_step(twin, twin_nets, trainer._spans, images, labels)
    torch.testing.assert_close(result.module_losses, expected, rtol=1e-10, atol=1e-12)
    for ours, plain in ((model, twin), (trainer.aux_nets, twin_nets)):
        for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_vgg_learns_and_stays_a_plain_one(torchvision, batch_norm):
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(256, 32), nn.ReLU(True), nn.Linear(32, 4))
    layers = [8, "M", 16, 16, "M"]
    model = nets.vgg(torchvision, layers, batch_norm, avgpool=nn.Identity(), classifier=classifier)
    keys = list(model.state_dict())
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    trainer = LocalTrainer(model, depth=3, optimizer=SGD)
    first = trainer.step(images, labels).module_losses
    for _ in range(10):
        last = trainer.step(images, labels).module_losses
    assert len(first) == 3 and (last < 0.8 * first).all()
    assert_isolated(trainer, images, labels)
    assert type(model) is torchvision.models.VGG and list(model.state_dict()) == keys
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(model.state_dict())
    assert fresh.eval()(images).argmax(1).eq(labels).float().mean() > 0.5


def test_result_and_freed_gradients(trainer, batch):
    result = trainer.step(*batch)
    assert result.logits.shape == (8, 10) and result.module_losses.shape == (3,)
    assert torch.equal(result.loss, result.module_losses[-1])
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, batch[1]), rtol=1e-6, atol=0)
    assert not any(t.requires_grad for t in (result.loss, result.logits, result.module_losses))
    assert all(p.grad is None for p in [*trainer.model.parameters(), *trainer.aux_nets.parameters()])
    assert trainer.plan.input_shape == (8, 3, 16, 16)
    trainer.check()


def test_activations_are_gone_before_the_next_module_starts(monkeypatch):
    """What lives at the start of each module is the same whatever came before: its input, nothing else."""
    torch.manual_seed(0)
    model = models.CifarResNet(4)
    trainer = LocalTrainer(model, depth=2)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    trainer.step(images, labels)
    at_start, run = [], Program.run

    def watched(program, inputs, labels, images, scale):
        at_start.append(live.now - inputs[0].untyped_storage().nbytes())
        return run(program, inputs, labels, images)

    monkeypatch.setattr(Program, "run", watched)
    existing = [*trainer.tensors(), images, labels]
    with LiveBytes(existing) as live:
        trainer.step(images, labels)
    assert len(at_start) == 12
    one_map = 16 * 16 * 16 * 16 * 4
    # Between modules only losses and logits accumulate: less than a hundredth of one feature map.
    assert max(at_start[1:]) - min(at_start[1:]) < one_map / 100


def test_local_learning_needs_less_memory_than_bp():
    def activations(**options):
        torch.manual_seed(0)
        trainer = LocalTrainer(models.resnet32(), **options)
        images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        trainer.step(images, labels)
        with LiveBytes([*trainer.tensors(), images, labels]) as live:
            at_rest = live.now
            trainer.step(images, labels)
        return live.peak - at_rest

    assert activations(depth=4) < 0.4 * activations(rule="bp")


def test_bf16_keeps_parameters_and_statistics_in_fp32(tiny_model, batch):
    trainer = LocalTrainer(tiny_model, depth=2, precision="bf16")
    result = trainer.step(*batch)
    features, logits, _ = trainer.backward(0, *batch)
    assert (features.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert result.loss.dtype == torch.float32
    assert {v.dtype for v in tiny_model.state_dict().values()} == {torch.float32, torch.int64}
    full = LocalTrainer(copy.deepcopy(tiny_model), depth=2)
    full.aux_nets.load_state_dict(trainer.aux_nets.state_dict())
    torch.testing.assert_close(trainer.step(*batch).loss, full.step(*batch).loss, rtol=0.05, atol=0.05)


def test_channels_last_gives_the_same_step(tiny_model, batch):
    twin = copy.deepcopy(tiny_model)
    images, labels = batch
    results = []
    for model, layout in ((tiny_model, torch.contiguous_format), (twin, torch.channels_last)):
        torch.manual_seed(3)
        results.append(LocalTrainer(model, depth=2).step(images.contiguous(memory_format=layout), labels).module_losses)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.AdamW,
        partial(torch.optim.RMSprop, lr=1e-3),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    ],
)
def test_any_optimizer_by_a_factory(tiny_model, batch, factory):
    trainer = LocalTrainer(tiny_model, depth=2, optimizer=factory)
    assert len({id(o) for o in trainer.optimizers}) == 3
    first = trainer.step(*batch).module_losses
    for _ in range(5):
        last = trainer.step(*batch).module_losses
    assert (last < first).all()


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (torch.optim.LBFGS, ValueError, "LBFGS cannot train local modules: .* choose one without a closure"),
        (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), TypeError, "must be a factory.* given SGD"),
        ("sgd", TypeError, "must be a factory.* given str"),
        (lambda p: torch.optim.SGD(p[:1]), ValueError, "must train exactly the parameters that it is called with"),
        (list, TypeError, "must make a torch.optim.Optimizer, given one that makes list"),
    ],
)
def test_what_cannot_be_an_optimizer(tiny_model, factory, kind, message):
    with pytest.raises(kind, match=message):
        LocalTrainer(tiny_model, depth=2, optimizer=factory)


def test_learning_rate_factor(trainer):
    trainer.set_learning_rate_factor(0.5)
    trainer.set_learning_rate_factor(0.1)
    assert all(o.param_groups[0]["lr"] == pytest.approx(0.01) for o in trainer.optimizers)


def test_a_model_that_is_frozen_as_a_whole_is_refused(tiny_model):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen, and nothing would be trained: call"):
        LocalTrainer(tiny_model, depth=2)


def test_precision_is_checked(tiny_model):
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, given 'fp8'"):
        LocalTrainer(tiny_model, depth=2, precision="fp8")


IMAGES, LABELS = torch.randn(4, 3, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("images", "labels", "kind", "message"),
    [
        (IMAGES, LABELS + 8, ValueError, "labels must be from 0 to 9 for this model of 10 classes, given 8 to 11"),
        (IMAGES, LABELS - 1, ValueError, "labels must be from 0 to 9 .* given -1 to 2: remap the labels"),
        (IMAGES, LABELS.float(), TypeError, r"labels must be int64 class numbers, given torch.float32: .*\.long\(\)"),
        (IMAGES, LABELS.int(), TypeError, "labels must be int64"),
        (IMAGES, LABELS[:3], ValueError, r"labels must be \(4,\), one per image, given shape \(3,\)"),
        (IMAGES, F.one_hot(LABELS), ValueError, r"labels must be \(4,\)"),
        (
            IMAGES[:, :1],
            LABELS,
            ValueError,
            r"images must be \(N, 3, H, W\) for this model, given shape \(4, 1, 8, 8\)",
        ),
        (IMAGES[0], LABELS, ValueError, r"images must be \(N, 3, H, W\)"),
        (IMAGES.to(torch.uint8), LABELS, TypeError, "images must be floating point, given torch.uint8"),
        (IMAGES.double(), LABELS, TypeError, r"images must be torch.float32 like the model, given torch.float64"),
        (IMAGES.half(), LABELS, TypeError, r"images must be torch.float32 like the model, given torch.float16"),
        (IMAGES * torch.nan, LABELS, ValueError, "images must be finite, given NaN or infinite"),
        (IMAGES / 0, LABELS, ValueError, "images must be finite"),
        (IMAGES[:1], LABELS[:1], ValueError, "at least 2 images for its batch statistics, given 1"),
        (IMAGES[:0], LABELS[:0], ValueError, "at least 2 images .* given 0"),
        (IMAGES.to("meta"), LABELS, ValueError, "images must be on the model's device, cpu, given meta"),
        (IMAGES, LABELS.to("meta"), ValueError, "labels must be on the model's device, cpu, given meta"),
        (IMAGES.numpy(), LABELS, TypeError, "images must be a tensor, given ndarray"),
    ],
)
def test_bad_batches_are_refused_before_any_weight_changes(trainer, images, labels, kind, message):
    before = snapshot(trainer.model)
    with pytest.raises(kind, match=message):
        trainer.step(images, labels)
    assert unchanged(trainer.model, before)


@pytest.mark.parametrize("fault", ["nan", "label"])
def test_where_values_are_not_at_hand_they_are_flagged(trainer, batch, fault):
    """What a CUDA device does, on the CPU: no value is read in the step, `check` raises, weights stay finite."""
    trainer._values_are_at_hand = False
    images, labels = batch[0].clone(), batch[1].clone()
    trainer.step(images, labels)
    trainer.check()
    if fault == "nan":
        images[3, 0, 2, 2] = torch.nan
    else:
        labels[2] = 10
    result = trainer.step(images, labels)
    assert result.loss.isnan() and result.module_losses.isnan().all()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    with pytest.raises(ValueError, match="images must be finite" if fault == "nan" else "labels must be from 0 to 9"):
        trainer.check()
    trainer.check()  # said once
    assert trainer.step(*batch).loss.isfinite()


def test_an_error_within_a_step_says_which_modules_are_ahead(trainer, batch, monkeypatch):
    before = snapshot(trainer.model)
    run = Program.run

    def failing(program, inputs, labels, images, scale):
        if program.features is None:
            raise torch.OutOfMemoryError("out of memory")
        return run(program, inputs, labels, images)

    monkeypatch.setattr(Program, "run", failing)
    message = "out of memory\nThe step stopped in local module 2 of 3. Modules 0 to 1 have taken this step already"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        trainer.step(*batch)
    after = trainer.model.state_dict()
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert torch.equal(after["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])
    assert all(p.grad is None for p in trainer.model.parameters())
    monkeypatch.undo()
    assert trainer.step(*batch).loss.isfinite()


def test_an_error_in_the_first_module_changes_nothing(trainer, batch, monkeypatch):
    monkeypatch.setattr(Program, "run", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="stopped in local module 0 of 3. No finished module was changed"):
        trainer.step(*batch)


def test_the_model_is_left_as_it_was(trainer, batch):
    model = trainer.model
    keys = list(model.state_dict())
    trainer.step(*batch)
    assert type(model) is models.CifarResNet and list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert {type(m) for m in model.modules()} == {
        models.CifarResNet,
        models.BasicBlock,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Sequential,
        nn.Linear,
    }
    assert "forward" not in vars(model)


def test_gradients_from_before_do_not_count(tiny_model, batch):
    twin = copy.deepcopy(tiny_model)
    for p in tiny_model.parameters():
        p.grad = torch.full_like(p, 100.0)
    states = []
    for model in (tiny_model, twin):
        torch.manual_seed(1)
        LocalTrainer(model, depth=2).step(*batch)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_within_the_callers_autocast_and_no_grad(tiny_model, batch):
    """An autocast of the caller's keeps no old weights, and a no_grad does not stop the step."""
    twin = copy.deepcopy(tiny_model)
    losses = []
    for model, around in ((tiny_model, torch.autocast("cpu", torch.bfloat16)), (twin, contextlib.nullcontext())):
        torch.manual_seed(1)
        trainer = LocalTrainer(model, depth=2, precision="bf16")
        with around:
            losses.append([trainer.step(*batch).loss.item() for _ in range(3)])
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]
    with torch.no_grad():
        assert trainer.step(*batch).loss.isfinite()


def test_expanded_images_and_the_callers_own_tensor_where_values_are_not_at_hand(trainer, batch):
    trainer._values_are_at_hand = False
    grey = batch[0][:, :1].clone()
    grey[0, 0, 0, 0] = torch.nan
    trainer.step(grey.expand(-1, 3, -1, -1), batch[1])
    assert grey[0, 0, 0, 0].isnan()
    with pytest.raises(ValueError, match="images must be finite"):
        trainer.check()


def test_half_precision_images_under_bf16(tiny_model, batch):
    trainer = LocalTrainer(tiny_model, depth=2, precision="bf16")
    assert trainer.step(batch[0].half() + 100, batch[1]).loss.isfinite()  # a sum in half precision would overflow


def test_models_in_half_precision_are_refused(tiny_model):
    with pytest.raises(TypeError, match=r"parameter conv1.weight is torch.float16: .* call model.float\(\)"):
        LocalTrainer(copy.deepcopy(tiny_model).half(), depth=2)
    tiny_model.fc.double()
    with pytest.raises(ValueError, match="parameter fc.weight is torch.float64 on cpu, expected torch.float32 on cpu"):
        LocalTrainer(tiny_model, depth=2)


def test_hooks_see_no_tracing(tiny_model, batch):
    tiny_model.fc = nn.Sequential(nn.Hardtanh(), nn.Dropout(0.1), tiny_model.fc)
    seen = []
    for module in tiny_model.modules():
        module.register_forward_hook(lambda m, i, o: seen.append((type(m), type(o), o.device.type)))
    LocalTrainer(tiny_model, depth=2).step(*batch)
    assert set(seen) == {(nn.Hardtanh, torch.Tensor, "cpu")}  # what autograd runs


def test_a_step_puts_the_model_into_training_mode(trainer, batch):
    trainer.model.eval()
    trainer.step(*batch)
    assert trainer.model.training


def test_a_larger_batch_is_planned_again_once_and_a_smaller_one_is_not(trainer, batch):
    images, labels = batch
    trainer.step(images, labels)
    first = trainer.plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(images[:3], labels[:3])  # an epoch's last batch
    assert trainer.plan is first
    with pytest.warns(
        UserWarning, match=r"a batch of shape \(16, 3, 16, 16\) does not fit the plan for \(8, 3, 16, 16\)"
    ):
        trainer.step(torch.cat([images, images]), torch.cat([labels, labels]))
    planned = trainer.plan
    assert planned.input_shape == (16, 3, 16, 16) and planned.peak_bytes > first.peak_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(images, labels)
    assert trainer.plan is planned


def test_out_of_memory_names_the_plan(trainer, batch, monkeypatch):
    def failing(program, inputs, labels, images, scale):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Program, "run", failing)
    with pytest.raises(torch.OutOfMemoryError, match=r"The plan predicts [\d.]+ MB for this step \([\d,]+ bytes\)\."):
        trainer.step(*batch)


def test_gradients_lie_as_their_parameters_do(batch):
    """Fused optimizers go over both side by side; channels_last convolutions give gradients in another order."""
    torch.manual_seed(0)
    trainer = LocalTrainer(models.CifarResNet(1), 2)
    images, labels = batch
    trainer.backward(0, images.contiguous(memory_format=torch.channels_last), labels)
    for parameter in trainer.local_modules[0].parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_a_cumulative_average_and_float64_with_a_biased_stem():
    model = models.CifarResNet(1).double()
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, dtype=torch.float64)
    model.layer1[0].bn1.momentum = None
    trainer = LocalTrainer(model, 2)
    trainer.step(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4))
    assert model.layer1[0].bn1.num_batches_tracked == 1
    assert not model.layer1[0].bn1.running_mean.eq(0).any()


@pytest.mark.parametrize("factor", [None, -1, float("nan"), float("inf"), "1", True, torch.ones(2)])
def test_factors_that_are_none(trainer, factor):
    trainer.set_learning_rate_factor(0.5)
    with pytest.raises(ValueError, match="factor must be a finite number of at least 0 to multiply .*, given "):
        trainer.set_learning_rate_factor(factor)
    assert all(o.param_groups[0]["lr"] == pytest.approx(0.05) for o in trainer.optimizers)


@pytest.mark.parametrize("shape", [(4, 3, 8, 0), (4, 3, 0, 8), (4, 3, 8, 8, 1), (3,)])
def test_images_of_no_width_or_of_another_shape(trainer, shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) for this model, given shape"):
        trainer.step(torch.zeros(shape), LABELS)
