"""The programs that use other trainers: PyTorch Lightning's and Hugging Face Accelerate's, where they are installed."""

import importlib
from pathlib import Path

import pytest
import torch

from auglocal_ext import LocalTrainer, models


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module


def batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return [(images[:8], labels[:8]), (images[8:], labels[8:])]


def loader():
    data = [torch.cat(part) for part in zip(*batches(), strict=True)]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8)


def made():
    torch.manual_seed(0)
    return models.CifarResNet(1, num_classes=4)


def stepped(epochs, rates=None):
    """The model after so many epochs of a plain loop."""
    model = made()
    torch.manual_seed(1)
    trainer = LocalTrainer(model, 2, modules=2)
    for epoch in range(epochs):
        if rates:
            trainer.set_learning_rate_factor(rates(epoch, epochs))
        for batch in batches():
            trainer.step(*batch)
    return model


def assert_same(model, other):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_lightning_trains_what_a_loop_does_and_goes_on(program, tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    LocalLearning = program("lightning_module").LocalLearning

    def fit(epochs, checkpoint=None):
        torch.manual_seed(0)
        local = LocalLearning(made(), depth=2, modules=2)
        torch.manual_seed(1)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(local, loader(), loader(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return local.model

    assert_same(fit(2), stepped(2))
    fit(1)
    assert_same(fit(2, tmp_path / "last.ckpt"), stepped(2))


def test_accelerate_trains_what_a_loop_does(program, capsys):
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from auglocal_ext.optim import cosine

    model = made()
    torch.manual_seed(1)
    accuracies = program("accelerate_loop").fit(model, loader(), loader(), 2, depth=2, modules=2)
    assert len(accuracies) == 2 and "epoch 2: loss" in capsys.readouterr().out
    assert_same(model, stepped(2, cosine))
