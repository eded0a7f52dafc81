"""CKA of units: the estimate is the textbook's, and does not see what it must not see."""

import pytest
import torch
from torch import nn

from auglocal_ext import analysis, models
from auglocal_ext.analysis.cka import Products, centred, centred_gram, products
from auglocal_ext.analysis.features import Features
from auglocal_ext.common.memory import LiveBytes


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic(k, m):
    """Song et al. 2012, equation 5."""
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def textbook(batches):
    """CKA of pairs of features (n, p), (n, q) of each batch: Nguyen et al. 2021, equation 4."""
    x, y = ([part @ part.T for part in parts] for parts in zip(*batches, strict=True))
    mixed, own, other = (sum(map(hsic, *pair)) for pair in ((x, y), (x, x), (y, y)))
    return mixed / (own.sqrt() * other.sqrt())


def ours(batches):
    found = Products([["x"], ["y"]])
    for pair in batches:
        found.add(torch.stack([centred_gram(part) for part in pair]))
    return found.between(0, 1).matrix.item()


def units_by_hooks(model, images):
    """What modules put out, another way than by running units."""
    found, handles = [], []
    blocks = [model.bn1, *model.layer1, *model.layer2, *model.layer3]
    for block in blocks:
        handles.append(block.register_forward_hook(lambda module, args, out: found.append(out.detach())))
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return [found[0].relu(), *found[1:]]


def mixed_model(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return models.CifarResNet(1).to(dtype)


def loader_of(images, size):
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(size)]


@pytest.mark.parametrize("n, p, q", [(4, 3, 5), (7, 20, 2), (40, 6, 100)])
@pytest.mark.parametrize("batches", [1, 3])
def test_it_is_the_textbooks(n, p, q, batches):
    pairs = [(normals(i, n, p) + 3, normals(50 + i, n, q)) for i in range(batches)]
    pairs = [(x, y + x[:, :1]) for x, y in pairs]  # related
    assert ours(pairs) == pytest.approx(textbook(pairs).item(), abs=1e-10)


def test_it_is_ignites():
    """Whose kernel is another one, exp(-distance^2 / 2)."""
    metrics = pytest.importorskip("ignite.metrics", reason="needs the package pytorch-ignite")
    x, y = normals(0, 30, 3), normals(1, 30, 3)
    y += x
    metric = metrics.HSIC(sigma_x=1, sigma_y=1)
    metric.update((x, y))
    k, m = (centred(torch.exp(-(torch.cdist(part, part) ** 2) / 2)) for part in (x, y))
    assert (k * m).sum().item() / (30 * 27) == pytest.approx(metric.compute(), rel=1e-5)


def test_two_models_by_units():
    """All pairs of units, in float64, by features that were found another way."""
    one, other, images = mixed_model(0), mixed_model(1), normals(2, 24, 3, 16, 16)
    found = analysis.cka(one, other, loader_of(images, 8))
    assert found.rows == found.columns == ["stem", "layer1.0", "layer2.0", "layer3.0"] and found.images == 24
    rows, columns = ([units_by_hooks(m, part) for part in images.split(8)] for m in (one, other))
    for row in range(4):
        for column in range(4):
            pairs = [(x[row].flatten(1), y[column].flatten(1)) for x, y in zip(rows, columns, strict=True)]
            assert found.matrix[row, column].item() == pytest.approx(textbook(pairs).item(), abs=1e-10)
    assert found.matrix.dtype == torch.float64


def test_a_model_with_itself_and_float32():
    images = normals(2, 32, 3, 16, 16)
    exact = analysis.cka(model := mixed_model(0), model, loader_of(images, 16)).matrix
    torch.testing.assert_close(exact, exact.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(exact.diagonal(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)
    other = mixed_model(0)
    again = analysis.cka(model, other, loader_of(images, 16)).matrix
    torch.testing.assert_close(exact, again, rtol=0, atol=1e-12)
    model = model.float()
    single = analysis.cka(model, model, loader_of(images.float(), 16)).matrix
    torch.testing.assert_close(exact, single, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [32, 64])
def test_on_independent_features_it_is_0_where_the_biased_one_is_not(n):
    """Of p features on both sides and n images the biased estimate is p / (n + p)."""
    p, draws, biased, unbiased = 8, 200, [], []
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    for seed in range(draws):
        x, y = normals(2 * seed, n, p), normals(2 * seed + 1, n, p)
        k, m = (centring @ part @ part.T @ centring for part in (x, y))
        biased.append(((k * m).sum() / (k.norm() * m.norm())).item())
        unbiased.append(ours([(x, y)]))
    assert sum(biased) / draws == pytest.approx(p / (n + p), rel=0.05)
    unbiased = torch.tensor(unbiased)
    assert abs(unbiased.mean()) < 3 * unbiased.std() / draws**0.5


def test_mini_batches_come_to_what_all_images_give():
    x = normals(0, 1024, 10)
    y = x @ normals(1, 10, 10) + 4 * normals(2, 1024, 10)
    whole = ours([(x, y)])
    far = [abs(ours(list(zip(x[:n].split(32), y[:n].split(32), strict=True))) - whole) for n in (64, 1024)]
    assert 0.2 < whole < 0.9 and far[1] < 0.01 and far[1] < far[0]


def test_rotation_scale_and_offset_change_nothing():
    x, y = normals(0, 20, 6), normals(1, 20, 6)
    rotation = torch.linalg.qr(normals(2, 6, 6)).Q
    assert ours([(x @ rotation * 7 + 100, y)]) == pytest.approx(ours([(x, y)]), abs=1e-10)
    assert ours([(x, x @ rotation * 0.1)]) == pytest.approx(1, abs=1e-12)


def test_small_differences_of_large_features_are_not_lost():
    x, y = normals(0, 20, 6), normals(1, 20, 6)
    assert ours([((x + 1000).float(), y)]) == pytest.approx(ours([(x, y)]), abs=1e-3)


def test_short_and_surplus_batches_are_left_out():
    model, images = mixed_model(0), normals(2, 20, 3, 16, 16)
    whole = analysis.cka(model, model, loader_of(images[:16], 8))
    for loader, limit in ((loader_of(images, 8), None), (loader_of(images, 8), 18), (loader_of(images[:18], 8), 17)):
        found = analysis.cka(model, model, loader, limit)
        assert found.images == 16 and torch.equal(found.matrix, whole.matrix)
    assert analysis.cka(model, model, loader_of(images, 20), 9).images == 9


def test_memory_does_not_grow_with_images():
    model = Features(mixed_model(0, torch.float32))  # outside: reading units counts what has no data too

    def peak(batches):
        loader = ((torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64)) for _ in range(batches))
        with LiveBytes() as live:
            products([model], loader)
        return live.peak

    peak(1)  # with the one comparison of the units and the model
    assert 2e5 < peak(4) == peak(8) < 2e6


class Constant(nn.Module):
    """Its second convolution's features are the same for all images."""

    def __init__(self, value):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, value)

    def forward(self, x):
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("value", [0.3, -1.0])
def test_a_unit_of_no_variance_warns_and_has_0(value):
    torch.manual_seed(0)
    model, images = Constant(value), torch.randn(12, 3, 8, 8)
    with pytest.warns(UserWarning, match="unit second puts out the same for all images: it has no CKA, and 0 is put"):
        found = analysis.cka(model, model, loader_of(images, 6)).matrix
    assert found.tolist() == [[pytest.approx(1), 0], [0, 0]]


def test_of_two_models_it_is_told_which_units_are_meant():
    torch.manual_seed(0)
    one, other, images = Constant(0.3), Constant(-1.0), loader_of(torch.randn(12, 3, 8, 8), 6)
    with pytest.warns(UserWarning) as told:
        analysis.cka(one, other, images)
    assert [str(warning.message).partition(" puts")[0] for warning in told] == [
        "unit second of model_a",
        "unit second of model_b",
    ]
    nn.init.constant_(other.first.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the features of unit stem of model_b are NaN or infinite"):
        analysis.cka(one, other, images)


def test_a_units_own_hsic_is_not_negative():
    """Rounding cannot make it so: it is a sum of squares."""
    for scale in (1e-12, 1.0, 1e6):
        gram = centred_gram((1000 + scale * normals(0, 4, 500)).float()).flatten()
        assert gram @ gram >= 0


def test_values_that_are_not_finite_are_told():
    model, images = mixed_model(0), normals(2, 8, 3, 16, 16)
    model.layer2[0].conv1.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the features of unit layer2.0 are NaN or infinite"):
        analysis.cka(model, model, loader_of(images, 8))


@pytest.mark.parametrize(
    "loader, limit, message",
    [
        ([], None, "the loader is empty"),
        (loader_of(torch.zeros(3, 3, 16, 16), 3), None, "CKA needs batches of at least 4 images, given 3"),
        (loader_of(torch.zeros(8, 3, 16, 16), 8), 3, "images must be a whole number of at least 4, given 3"),
        (loader_of(torch.zeros(8, 1, 16, 16), 8), None, r"images must be \(N, 3, H, W\) for this model, given shape"),
    ],
)
def test_mistakes(tiny_model, loader, limit, message):
    with pytest.raises(ValueError, match=message):
        analysis.cka(tiny_model, tiny_model, loader, limit)
    assert tiny_model.training


def test_the_model_is_as_it_was(tiny_model, batch):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_model.layer1.eval()
    analysis.cka(tiny_model, tiny_model, [batch])
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())
    assert tiny_model.training and tiny_model.layer3.training and not tiny_model.layer1.training
    assert not any(module._forward_hooks for module in tiny_model.modules())


class Dropped(nn.Module):
    """What it does in eval mode its forward decides: by a function that is told, or by itself."""

    def __init__(self, by_itself):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.by_itself = by_itself

    def forward(self, x):
        x = self.first(x).relu()
        if not self.by_itself:
            x = nn.functional.dropout(x, 0.5, self.training)
        elif self.training:
            x = 2 * x
        return self.fc(self.second(x).relu().mean((2, 3)))


def test_a_forward_that_looks_at_the_mode():
    torch.manual_seed(0)
    model, images = Dropped(by_itself=False), torch.randn(8, 3, 8, 8)
    found = analysis.cka(model, model, loader_of(images, 8))
    found = [found, analysis.cka(model, model, loader_of(images, 8))]
    assert torch.equal(found[0].matrix, found[1].matrix)
    with pytest.raises(ValueError, match="the units of Dropped do not compute what its forward does in eval mode: let"):
        analysis.cka(model := Dropped(by_itself=True), model, loader_of(images, 8))
