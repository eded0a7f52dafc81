"""All of torchvision's classification models: cut, planned, and trained for a step, against the model's own forward and
plain autograd on the same local modules.

By default the smallest of each family run, and the others are cut without data; `--long` runs all of them, one at a
time, at the size of images that each was made for.
"""

import copy
import tempfile
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, plan
from auglocal_ext.backbone import as_backbone

# The smallest of each family, and a side of images that it takes.
SMALL = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "inception_v3": 107,
    "maxvit_t": 224,  # of no other size, for windows of 7
    "vit_b_32": 64,
}
# With which they take images that small: Inception without heads of its own, as GoogLeNet has them too.
FOR_SMALL_IMAGES = {"inception_v3": {"aux_logits": False}, "vit_b_32": {"image_size": 64}}
# Their steps in float64 take long; narrow models of their classes take theirs (test_a_step_of_narrow_transformers).
SMALL_IN_FLOAT32 = {"maxvit_t", "vit_b_32"}
# Their classifiers have a hundred million weights, which take a step most of its time: by default they are narrow.
LARGE_CLASSIFIERS = {"alexnet", "vgg11_bn"}
# Where the paper's net, dense convolutions 7,392 channels wide, takes 8 GB by itself, and as much for its gradients.
LIGHT_NETS = {"regnet_y_128gf"}
SIDES = {"inception_v3": 299, "vit_h_14": 224}  # of those that were not made for images of 224
LARGE = 2**31  # bytes of weights that are put away in a file: the largest models leave no room for copies


def builders():
    models = pytest.importorskip("torchvision", exc_type=Exception).models
    return [name for name in models.list_models(module=models)]


def build(torchvision, name, on_meta=False, **options):
    """A builder's model of 10 classes, without what is drawn at random in a step."""
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with torch.device("meta" if on_meta else "cpu"), warnings.catch_warnings(), numbers_of_regnets(torchvision):
        warnings.simplefilter("ignore")
        return deterministic(torchvision, torchvision.models.get_model(name, num_classes=10, **options))


def numbers_of_regnets(torchvision):
    """A RegNet reads its blocks' widths off tensors, which needs data; its weights do not."""
    parameters = torchvision.models.regnet.BlockParams
    real = parameters.from_init_params

    def with_data(*given, **options):
        with torch.device("cpu"):
            return real(*given, **options)

    return mock.patch.object(parameters, "from_init_params", with_data)


def deterministic(torchvision, model):
    """The model without what is drawn at random in a step, and with gradients at a head that begins with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if "Attention" in type(module).__name__ and hasattr(module, "attention_dropout"):
            module.attention_dropout = module.dropout = 0.0
    for head in (m for m in model.modules() if isinstance(m, nn.Linear)):  # a ViT's
        if not head.weight.is_meta and not head.weight.any():
            nn.init.normal_(head.weight, std=0.02)
    return model


def check_a_step(model, side, **options):
    """One step of SGD with lr 1: values, gradients of each module by plain autograd, statistics, what is left alone."""
    dtype = next(model.parameters()).dtype
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-4}
    bound = 1e-7 if dtype == torch.float64 else 1e-2  # of a gradient, against the layer's largest
    images, labels = torch.randn(2, 3, side, side, dtype=dtype), torch.tensor([1, 7])
    model.eval()
    keys, before = list(model.state_dict()), put_away(model.state_dict())
    with torch.no_grad():
        in_eval = model(images)
        out = model.train()(images)
    out, buffers = getattr(out, "logits", out), {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(before)
    trainer = LocalTrainer(model, image_size=side, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    of_aux_nets = put_away(trainer.aux_nets.state_dict())
    result = trainer.step(images, labels)
    torch.testing.assert_close(result.logits, out, **tolerance)
    unused = unused_buffers(model, trainer)
    for name, ours in model.named_buffers():
        if name not in unused:
            torch.testing.assert_close(ours, buffers[name], msg=name, **tolerance)
    stepped = [put_away({name: p.detach() for name, p in m.named_parameters()}) for m in trainer.local_modules]
    model.load_state_dict(before)
    trainer.aux_nets.load_state_dict(of_aux_nets)
    x, seen = images, 0
    for module, after in zip(trainer.local_modules, stepped, strict=True):
        features, logits = module(x.detach())
        F.cross_entropy(logits, labels).backward()
        for (name, theirs), ours in zip(module.named_parameters(), after.values(), strict=True):
            gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            difference = (theirs.detach() - ours - gradient).abs().max()
            assert difference <= bound * max(1, gradient.abs().max()), f"{name}: off by {difference}"
            seen += theirs.grad is not None
            theirs.grad = None
        x = features
    assert seen > len(trainer.local_modules)
    assert list(model.state_dict()) == keys
    model.load_state_dict(before)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), in_eval, rtol=0, atol=0)
    return trainer


def put_away(state):
    """A copy of named tensors; of large ones in a file that is read as they are looked at."""
    if sum(value.nbytes for value in state.values()) < LARGE:
        return copy.deepcopy(state)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, f"{folder}/state.pt")
        return torch.load(f"{folder}/state.pt", mmap=True)  # whose pages stay when the file has no name any more


def unused_buffers(model, trainer):
    """Those of the model's own auxiliary heads, which are left out."""
    used = {id(buffer) for module in trainer.local_modules for buffer in module.buffers()}
    return {name for name, buffer in model.named_buffers() if id(buffer) not in used}


def expected_side(name, long):
    return SMALL[name] if name in SMALL and not long else SIDES.get(name, 224)


@pytest.mark.parametrize("name", builders())
def test_a_step_of_each(torchvision, name, long):
    if name not in SMALL and not long:
        pytest.skip("--long runs all; by default the smallest of each family run")
    torch.manual_seed(0)
    model = build(torchvision, name, **({} if long else FOR_SMALL_IMAGES.get(name, {})))
    if not long and name in LARGE_CLASSIFIERS:
        with_a_narrow_classifier(model)
    if long or name not in SMALL_IN_FLOAT32:
        model = model.double()
    auxiliary = "light" if name in LIGHT_NETS else "paper"
    check_a_step(model, expected_side(name, long), depth=2, auxiliary=auxiliary)


def with_a_narrow_classifier(model, width=32):
    """Hidden layers of so many features, in place."""
    linear = [index for index, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    for index in linear:
        given, made = model.classifier[index].in_features, model.classifier[index].out_features
        given, made = given if index == linear[0] else width, made if index == linear[-1] else width
        model.classifier[index] = nn.Linear(given, made)


@pytest.mark.parametrize("name", sorted(SMALL_IN_FLOAT32))
def test_a_step_of_narrow_transformers(torchvision, name):
    torch.manual_seed(0)
    models = torchvision.models
    if name == "vit_b_32":
        model = models.VisionTransformer(32, 16, 4, 2, 16, 32, num_classes=10)
    else:
        sizes = {"partition_size": 4, "block_channels": [8, 16], "block_layers": [1, 1], "head_dim": 4}
        model = models.MaxVit((32, 32), 8, stochastic_depth_prob=0.0, num_classes=10, **sizes)
    check_a_step(deterministic(torchvision, model).double(), 32, depth=2)


@pytest.mark.parametrize("name", builders())
def test_each_is_cut(torchvision, name, long):
    model = build(torchvision, name, on_meta=True)
    backbone = as_backbone(model)
    held = [id(p) for unit in backbone.units for p in unit.module.parameters()]
    held += [id(p) for p in backbone.classifier.parameters()]
    assert len(set(held)) == len(held)
    names = {id(p): name for name, p in model.named_parameters()}
    left_out = {name.split(".")[0] for i, name in names.items() if i not in held}
    assert left_out <= {"aux1", "aux2", "AuxLogits"}
    assert bool(left_out) == bool(backbone.left_out)
    assert len(backbone.units) >= 5
    if long:
        planned = plan(model, (16, 3, *[SIDES.get(name, 224)] * 2), depth=2, auxiliary="light", modules=2)
        assert planned.macs < 1.35 * planned.bp_macs


def test_own_auxiliary_heads_are_left_out_and_said_so(torchvision):
    model = build(torchvision, "googlenet")
    with pytest.warns(UserWarning, match="heads of its own, aux_logits2 and aux_logits1: they are not trained"):
        LocalTrainer(model, depth=2)
