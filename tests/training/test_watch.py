"""What changes after a trainer was made: followed where that is possible, else refused before anything moves."""

import copy
import pickle
import sys
import time
import types
import warnings
from functools import partial

import nets
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from auglocal_ext import LocalTrainer, models
from auglocal_ext.common.memory import LiveBytes

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.fixture
def trainer(tiny_model, batch):
    made = LocalTrainer(tiny_model, depth=2, optimizer=SGD)  # stem | layer1.0 | layer2.0 + layer3.0
    made.step(*batch)
    return made


def tensors(trainer):
    return {name: t.clone() for root in (trainer.model, trainer.aux_nets) for name, t in root.named_parameters()} | {
        f"{name} of {i}": t.clone()
        for i, root in enumerate((trainer.model, trainer.aux_nets))
        for name, t in root.named_buffers()
    }


def moved(trainer, before):
    return {name for name, value in tensors(trainer).items() if name in before and not torch.equal(value, before[name])}


def assert_plan_is_exact(trainer, batch):
    trainer.step(*batch)
    with LiveBytes([*trainer.tensors(), *batch]) as live:
        trainer.step(*batch)
    assert live.peak == trainer.plan.peak_bytes


# ---- what is followed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen",
    ["layer1", "conv1", "bn1", "layer2.0.bn1", "layer3.0.downsample", "fc", "fc.bias", "layer1.0.bn1.weight", ""],
)
def test_what_is_frozen_stays(trainer, batch, frozen):
    gradients = {p: p.numel() for p in trainer.model.parameters()}
    chosen = [p for name, p in trainer.model.named_parameters() if f"{name}.".startswith(f"{frozen}.") or not frozen]
    for parameter in chosen:
        parameter.requires_grad_(False)
    counted = sum(module.gradient_bytes for module in trainer.plan.modules)
    before = [p.clone() for p in chosen]
    free = {p: p.clone() for p in gradients if p not in set(chosen)}
    result = trainer.step(*batch)
    assert all(torch.equal(p, q) for p, q in zip(chosen, before, strict=True))
    assert not any(torch.equal(p, value) for p, value in free.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    now = sum(module.gradient_bytes for module in trainer.plan.modules)
    unused = [net for net, trained in zip(trainer.aux_nets, result.trained, strict=False) if not trained]
    assert len(unused) == {"layer1": 1, "": 2}.get(frozen, 0)
    assert counted - now == 4 * sum(p.numel() for p in [*chosen, *(p for net in unused for p in net.parameters())])
    assert_plan_is_exact(trainer, batch)
    trainer.model.requires_grad_(True)
    trainer.step(*batch)
    assert not any(torch.equal(p, q) for p, q in zip(chosen, before, strict=True))


@pytest.mark.parametrize("frozen", ["features", "classifier", "features.0", "features.4"])
def test_what_is_frozen_in_a_vgg_stays(torchvision, frozen):
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 4))
    model = nets.vgg(torchvision, [4, "M", 8, 8, "M"], avgpool=nn.Identity(), classifier=classifier)
    trainer = LocalTrainer(model, depth=2, modules=2, optimizer=SGD)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    trainer.step(images, labels)
    chosen = model.get_submodule(frozen).requires_grad_(False)
    before, free = copy.deepcopy(chosen.state_dict()), copy.deepcopy(model.state_dict())
    trainer.step(images, labels)
    assert all(torch.equal(value, before[name]) for name, value in chosen.state_dict().items())
    assert any(not torch.equal(value, free[name]) for name, value in model.state_dict().items())
    assert_plan_is_exact(trainer, (images, labels))


def test_frozen_aux_nets_stay(trainer, batch):
    trainer.aux_nets.requires_grad_(False)
    before = copy.deepcopy(trainer.aux_nets)
    weight = trainer.model.conv1.weight.clone()
    trainer.step(*batch)
    assert all(torch.equal(p, q) for p, q in zip(trainer.aux_nets.parameters(), before.parameters(), strict=True))
    assert not torch.equal(trainer.model.conv1.weight, weight)
    assert_plan_is_exact(trainer, batch)


def test_gradients_of_the_rest_do_not_depend_on_what_is_frozen(batch):
    """Against autograd, with a frozen part in the middle of a module."""
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    images, labels = batch[0].double(), batch[1]
    trainer = LocalTrainer(model, rule="bp", optimizer=partial(torch.optim.SGD, lr=1.0))
    model.layer2.requires_grad_(False)
    model.layer1[0].bn2.bias.requires_grad_(False)
    own = copy.deepcopy(model).train()
    nn.functional.cross_entropy(own(images), labels).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step(images, labels)
    for (name, after), expected in zip(model.named_parameters(), own.parameters(), strict=True):
        gradient = torch.zeros_like(after) if expected.grad is None else expected.grad
        torch.testing.assert_close(before[name] - after.detach(), gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_aux_nets_in_eval_mode_use_their_statistics(trainer, batch):
    trainer.aux_nets.eval()
    before = copy.deepcopy(trainer.aux_nets)
    features = [None]
    trainer.aux_nets[0].register_forward_pre_hook(lambda module, given: features.append(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = trainer.step(*batch).module_losses
    for ours, theirs in zip(trainer.aux_nets.buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert losses.isfinite().all()
    assert_plan_is_exact(trainer, batch)
    trainer.aux_nets.train()
    trainer.step(*batch)
    assert any(not torch.equal(a, b) for a, b in zip(trainer.aux_nets.buffers(), before.buffers(), strict=True))


@pytest.mark.parametrize("name", ["bn1", "layer1.0.bn2", "layer3.0.downsample.1"])
def test_one_norm_in_eval_mode(trainer, batch, name):
    norm = trainer.model.get_submodule(name).eval()
    before = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    trainer.step(*batch)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.num_batches_tracked, before[1])
    assert not norm.training


def test_dropout_in_eval_mode(tiny_model, batch):
    tiny_model.fc = nn.Sequential(nn.Dropout(0.5), tiny_model.fc)
    trainer = LocalTrainer(tiny_model, rule="bp", optimizer=partial(torch.optim.SGD, lr=0.0))
    random = {trainer.step(*batch).loss.item() for _ in range(3)}
    tiny_model.fc[0].eval()
    assert len(random) == 3 and len({trainer.step(*batch).loss.item() for _ in range(3)}) == 1


@pytest.mark.parametrize("kind", ["track_running_stats", "none"])
def test_statistics_switched_off(trainer, batch, kind):
    """As torch: without them, or where they are None, batches are normalised by their own, and nothing is recorded."""
    norm = trainer.model.layer1[0].bn1
    before = norm.running_mean.clone()
    if kind == "none":
        norm.running_mean = norm.running_var = None
    else:
        norm.track_running_stats = False
    own = copy.deepcopy(trainer.model).train()
    expected = own(batch[0])
    result = trainer.step(*batch)
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-5)
    assert norm.running_mean is None or torch.equal(norm.running_mean, before)
    assert_plan_is_exact(trainer, batch)


def test_statistics_replaced_are_the_ones_that_move(trainer, batch):
    norm = trainer.model.bn1
    norm.running_mean = torch.zeros(16)
    trainer.step(*batch)
    assert not norm.running_mean.eq(0).any()


def test_a_model_that_was_moved_away_is_refused(trainer, batch):
    trainer.model.to("meta")
    with pytest.raises(ValueError, match="parameter conv1.weight .*(on meta|was replaced)"):
        trainer.step(*batch)


def test_a_forward_put_on_an_object_later_is_followed(trainer, batch):
    trainer.model.fc.forward = partial(lambda fc, x: 2 * nn.functional.linear(x, fc.weight, fc.bias), trainer.model.fc)
    own = copy.deepcopy(trainer.model).train()
    own.fc.forward = partial(lambda fc, x: 2 * nn.functional.linear(x, fc.weight, fc.bias), own.fc)
    expected = own(batch[0])
    torch.testing.assert_close(trainer.step(*batch).logits, expected, rtol=1e-4, atol=1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------


def replace_fc(trainer):
    trainer.model.fc = nn.Linear(64, 10)


def assign(trainer):
    trainer.model.load_state_dict({k: v.clone() for k, v in trainer.model.state_dict().items()}, assign=True)


def new_parameter(trainer):
    trainer.model.layer1[0].bn1.weight = nn.Parameter(torch.ones(16))


def new_block(trainer):
    trainer.model.layer2[0] = models.BasicBlock(16, 32, 2)


def more_layers(trainer):
    trainer.model.layer1.append(models.BasicBlock(16, 16))


def other_aux_net(trainer):
    trainer.aux_nets[0].net[-1] = nn.Linear(64, 10)


def other_aux_parameter(trainer):
    trainer.aux_nets[1].net[-1].bias = nn.Parameter(torch.zeros(10))


def no_bias(trainer):
    trainer.model.fc.bias = None


def pruned(trainer):
    prune.l1_unstructured(trainer.model.layer1[0].conv1, "weight", 0.5)


def parametrized(trainer):
    nn.utils.parametrizations.weight_norm(trainer.model.layer1[0].conv2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_fc, "fc was replaced since the trainer was made.*make a new trainer"),
        (assign, "parameter conv1.weight was replaced since .*without assign=True"),
        (new_parameter, "parameter layer1.0.bn1.weight was replaced"),
        (new_block, "layer2.0 was replaced"),
        (more_layers, "layer1.1 was replaced"),
        (other_aux_net, "aux_nets.0.net.2 was replaced|aux_nets.0.net.[0-9]+ was replaced"),
        (other_aux_parameter, "parameter aux_nets.1.net.[0-9]+.bias was replaced"),
        (no_bias, "fc was replaced"),
        (pruned, "layer1.0.conv1 was replaced"),
        (parametrized, r"layer1.0.conv2.* was replaced"),
        (
            lambda t: t.model.double(),
            "parameter conv1.weight is torch.float64 on cpu .*, it was torch.float32 on cpu .* when",
        ),
        (lambda t: t.aux_nets.double(), "parameter aux_nets.0.net.0.conv1.weight is torch.float64"),
        (lambda t: t.model.layer3.half(), "parameter layer3.0.conv1.weight is torch.float16 on cpu"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_moves(trainer, batch, change, message):
    change(trainer)
    before = tensors(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.step(*batch)
    assert not {name for name in moved(trainer, before) if not before[name].is_meta}


# ---- eval mode, inference mode, pickle -----------------------------------------------------------------------


def test_a_model_in_eval_mode_as_a_whole_is_switched_and_said_so_once(trainer, batch):
    trainer.model.eval()
    with pytest.warns(UserWarning, match="the model was in eval mode as a whole: a step puts it into training mode"):
        trainer.step(*batch)
    assert all(module.training for module in trainer.model.modules())
    trainer.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(*batch)
    assert trainer.model.training


def test_parts_in_training_mode_are_somebodys_choice(trainer, batch):
    trainer.model.eval()
    trainer.model.layer1.train()
    trainer.step(*batch)
    assert not trainer.model.bn1.training and trainer.model.layer1[0].bn1.training


def test_within_inference_mode(batch):
    torch.manual_seed(0)
    expected = [LocalTrainer(models.CifarResNet(1), depth=2).step(*batch).loss.item()]
    with torch.inference_mode():
        torch.manual_seed(0)
        with torch.inference_mode(False):
            model = models.CifarResNet(1)
        trainer = LocalTrainer(model, depth=2)
        images, labels = batch[0].clone(), batch[1].clone()
        assert images.is_inference()
        assert trainer.step(images, labels).loss.item() == expected[0]
        model = models.CifarResNet(1)
    with pytest.raises(ValueError, match=r"parameter conv1.weight was made under torch.inference_mode\(\)"):
        LocalTrainer(model, depth=2)


@pytest.mark.parametrize("how", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("rule", ["auglocal", "predsim"])
def test_a_trainer_can_be_stored_and_goes_on_the_same(tiny_model, batch, how, rule):
    trainer = LocalTrainer(tiny_model, depth=2, rule=rule, image_size=16)
    trainer.step(*batch)
    twin = how(trainer)
    for _ in range(2):
        assert torch.equal(trainer.step(*batch).module_losses, twin.step(*batch).module_losses)
    for ours, theirs in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs


# ---- everything that trains is there -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["auglocal", "dgl", "predsim", "infopro", "bp", "checkpoint"])
def test_every_rule_restored_by_hand_continues_exactly(rule, batch):
    """From the state_dicts of the model, the aux nets and the optimizers, into a trainer made anew."""
    images, labels = batch[0].sigmoid() - 0.5, batch[1]

    def make(seed):
        torch.manual_seed(seed)
        options = {"depth": 2} if rule == "auglocal" else {}
        return LocalTrainer(models.CifarResNet(1), rule=rule, image_size=16, optimizer=SGD, **options)

    trainer = make(0)
    for _ in range(2):
        trainer.step(images, labels)
    trained = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert trained == {*trainer.model.parameters(), *trainer.aux_nets.parameters()}
    saved = copy.deepcopy(
        [trainer.model.state_dict(), trainer.aux_nets.state_dict(), [o.state_dict() for o in trainer.optimizers]]
    )
    restored = make(1)
    restored.model.load_state_dict(saved[0])
    restored.aux_nets.load_state_dict(saved[1])
    for optimizer, state in zip(restored.optimizers, saved[2], strict=True):
        optimizer.load_state_dict(state)
    for _ in range(2):
        assert torch.equal(restored.step(images, labels).module_losses, trainer.step(images, labels).module_losses)


# ---- hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "auglocal"])
def test_hooks_on_parameters_run(batch, rule):
    """A mask on every gradient, of fused layers and of those that autograd runs; once each."""
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    model.fc = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    trainer = LocalTrainer(model, depth=2, rule=rule, optimizer=SGD)
    masks, calls = {}, dict.fromkeys(model.parameters(), 0)
    parameters = [*model.parameters(), *trainer.aux_nets.parameters()]
    for parameter in parameters:
        masks[parameter] = torch.rand_like(parameter) < 0.5
        parameter.data[~masks[parameter]] = 0.0

        def hook(gradient, parameter=parameter):
            calls[parameter] = calls.get(parameter, 0) + 1
            return gradient * masks[parameter]

        parameter.register_hook(hook)
    before = [p.clone() for p in parameters]
    for _ in range(3):
        trainer.step(*batch)
    assert all(p[~masks[p]].eq(0).all() for p in parameters)
    assert all(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True) if p.dim() > 1)
    assert set(calls.values()) == {3}


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.bn1.bias", "fc.bias"])
def test_a_hook_that_changes_the_gradient_in_place(trainer, batch, name):
    parameter = trainer.model.get_parameter(name)

    def hook(gradient):
        gradient.zero_()

    parameter.register_hook(hook)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    before = parameter.clone()
    trainer.step(*batch)
    assert torch.equal(parameter, before)


def test_hooks_after_a_gradient_is_there(trainer, batch):
    seen = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.norm().item()}))
    own = copy.deepcopy(trainer.model).train()
    trainer.step(*batch)
    assert seen.keys() == {name for name, _ in own.named_parameters()} and all(seen.values())


def test_a_hook_may_step_by_itself(trainer, batch):
    """The gradient is the hook's to use up: what it removed, the optimizer does not step."""
    weight = trainer.model.fc.weight

    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad.sign())
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(step)
    before = weight.clone()
    trainer.step(*batch)
    torch.testing.assert_close((weight - before).abs(), torch.ones_like(weight))


@pytest.mark.parametrize(
    ("name", "register"),
    [
        ("layer1.0.conv1", "register_forward_hook"),
        ("layer2", "register_forward_pre_hook"),
        ("bn1", "register_full_backward_hook"),
        ("", "register_forward_hook"),
    ],
)
def test_a_hook_that_does_not_run_is_named_once(trainer, batch, name, register):
    getattr(trainer.model.get_submodule(name), register)(lambda *given: None)
    trainer.model.layer3[0].conv2.register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match=f"a hook on {name or 'CifarResNet'} does not run in a training step"):
        trainer.step(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(*batch)


def test_a_hook_that_runs_is_not_warned_of(tiny_model, batch):
    tiny_model.fc = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    seen = []
    tiny_model.fc[1].register_forward_hook(lambda *given: seen.append(given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalTrainer(tiny_model, rule="bp").step(*batch)
    assert len(seen) == 1


# ---- what it costs -------------------------------------------------------------------------------------------


def test_looking_costs_less_than_a_hundredth_of_a_small_step():
    torch.manual_seed(0)
    trainer = LocalTrainer(models.resnet20(), depth=4)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    trainer.step(images, labels)

    def least(run, times):
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return min(taken)

    tracing = sys.gettrace()  # that of a coverage run makes Python several times slower, and no kernel
    sys.settrace(None)

    def look():
        trainer._watch.check()
        trainer.plan_for(images)
        trainer._current_programs()

    try:
        assert least(look, 50) < 0.01 * least(lambda: trainer.step(images, labels), 10)
    finally:
        sys.settrace(tracing)


# ---- strides, shapes, settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.to(memory_format=torch.channels_last),
            r"parameter conv1.weight is .* strides \(27, 1, 9, 3\), it was",
        ),
        (lambda m: setattr(m.fc.weight, "data", torch.randn(20, 64)), r"fc.weight is .* of shape \(20, 64\) .* it was"),
        (
            lambda m: torch.utils.swap_tensors(m.bn1.weight, nn.Parameter(torch.ones(8))),
            r"bn1.weight is .* of shape \(8,\)",
        ),
    ],
)
def test_other_shapes_and_memory_formats_are_refused(trainer, batch, change, message):
    change(trainer.model)
    before = tensors(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.step(*batch)
    assert not moved(trainer, before)


def test_a_gradient_that_a_hook_makes_lies_as_its_parameter(batch):
    """Fused optimizers go over both side by side: a gradient of other strides would scramble the update."""
    states = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = models.CifarResNet(1).double().to(memory_format=layout)
        mask = torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)).double()
        model.layer1[0].conv1.weight.register_hook(lambda gradient, mask=mask: mask * gradient)
        trainer = LocalTrainer(model, rule="bp")
        for _ in range(2):
            trainer.step(batch[0].double(), batch[1])
        states.append(model.layer1[0].conv1.weight.detach().contiguous())
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)


def test_state_that_is_loaded_lies_as_its_parameters(batch):
    images, labels = batch[0].double(), batch[1]
    torch.manual_seed(0)
    saved = LocalTrainer(models.CifarResNet(1).double(), rule="bp")
    for _ in range(2):
        saved.step(images, labels)
    restored = LocalTrainer(models.CifarResNet(1).double().to(memory_format=torch.channels_last), rule="bp")
    restored.model.load_state_dict(saved.model.state_dict())
    restored.optimizers[0].load_state_dict(copy.deepcopy(saved.optimizers[0].state_dict()))
    for _ in range(2):
        expected, found = saved.step(images, labels), restored.step(images, labels)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("layer1.0.conv1", "padding_mode", "reflect"),
        ("layer1.0.conv2", "padding", "same"),
        ("maxpool", "dilation", 2),
        ("maxpool", "kernel_size", 5),
        ("layer1.0.bn1", "momentum", 0.5),
        ("layer2.0.conv1", "stride", (1, 1)),
        ("layer1.0.relu", "inplace", False),
    ],
)
def test_settings_that_change_are_followed(torchvision, name, attribute, value):
    resnet = torchvision.models.resnet
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    model.fc = nn.Linear(128, 4)
    model.layer3, model.layer4 = (nn.Sequential(resnet.BasicBlock(128, 128)) for _ in range(2))
    model.double()
    images, labels = torch.randn(4, 3, 24, 24).double(), torch.arange(4)
    trainer = LocalTrainer(model, rule="bp")
    trainer.step(images, labels)
    setattr(model.get_submodule(name), attribute, value)
    if attribute == "padding_mode":
        model.layer1[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    if attribute == "stride":
        model.layer2[0].downsample[0].stride = value
    own = copy.deepcopy(model).train()
    expected = own(images)
    torch.testing.assert_close(trainer.step(images, labels).logits, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(model.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_method_put_on_the_model_later_is_refused(trainer, batch):
    original = trainer.model.forward
    trainer.model.forward = lambda x: 4 * original(x)
    with pytest.raises(ValueError, match="forward was replaced on the object"):
        trainer.step(*batch)


@pytest.mark.parametrize("where", ["class", "object", "object, twice"])
def test_a_block_whose_forward_is_replaced_later(batch, where, monkeypatch):
    model = models.CifarResNet(1).double()
    images, labels = batch[0].double(), batch[1]
    trainer = LocalTrainer(model, rule="bp", optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer.step(images, labels)
    original, block = models.BasicBlock.forward, model.layer2[0]
    for factor in (2, 3) if where == "object, twice" else (2,):
        if where == "class":
            monkeypatch.setattr(models.BasicBlock, "forward", lambda self, x: 2 * original(self, x))
        else:
            vars(block).pop("forward", None)
            block.forward = types.MethodType(lambda self, x, factor=factor: factor * original(self, x), block)
        expected = copy.deepcopy(model).train()(images)
        torch.testing.assert_close(trainer.step(images, labels).logits, expected, rtol=1e-9, atol=1e-10)


def test_optimizers_that_were_exchanged_are_refused(trainer, batch):
    before = tensors(trainer)
    trainer.optimizers[0] = torch.optim.Adam(trainer.local_modules[0].parameters())
    with pytest.raises(ValueError, match="trainer.optimizers is not what the trainer made"):
        trainer.step(*batch)
    assert not moved(trainer, before)


@pytest.mark.parametrize("norm", ["bn1", "layer2.0.bn1", "fc.0"])
def test_a_norm_that_counts_no_batches(batch, norm):
    model = models.CifarResNet(1).double()
    model.fc = nn.Sequential(nn.BatchNorm1d(64, dtype=torch.float64), model.fc)
    model.get_submodule(norm).num_batches_tracked = None
    own = copy.deepcopy(model).train()
    expected = own(batch[0].double())
    result = LocalTrainer(model, rule="bp").step(batch[0].double(), batch[1])
    torch.testing.assert_close(result.logits, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(model.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["fused and autograd", "autograd twice"])
def test_a_hook_on_a_shared_weight_is_called_once_on_the_sum(batch, kind):
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    if kind == "autograd twice":
        hidden = nn.Linear(64, 64)
        model.fc = nn.Sequential(hidden, nn.Tanh(), hidden, nn.Tanh(), nn.Linear(64, 10)).double()
        weight = hidden.weight
    else:
        conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", bias=False).double()
        weight = conv.weight = model.layer1[0].conv1.weight
        model.layer1[0].conv2 = conv
    calls = []
    weight.register_hook(lambda gradient: calls.append(gradient.norm().item()) or gradient.clamp(-1e-3, 1e-3))
    own = copy.deepcopy(model).train()
    own_weight = own.fc[0].weight if kind == "autograd twice" else own.layer1[0].conv1.weight
    own_weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    images = batch[0].double()
    nn.functional.cross_entropy(own(images), batch[1]).backward()
    before = weight.detach().clone()
    LocalTrainer(model, rule="bp", optimizer=partial(torch.optim.SGD, lr=1.0)).step(images, batch[1])
    torch.testing.assert_close(before - weight.detach(), own_weight.grad, rtol=1e-8, atol=1e-10)
    assert len(calls) == 1


def test_hooks_on_every_module_of_the_process_are_named(trainer, batch):
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        with pytest.warns(UserWarning, match="a hook on every module of the process does not run in a training step"):
            trainer.step(*batch)
    finally:
        handle.remove()
