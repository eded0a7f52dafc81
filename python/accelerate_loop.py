"""Local learning in a loop of Hugging Face Accelerate: devices, loaders, logging are its own, the step LocalTrainer's.

    python python/accelerate_loop.py             a few epochs on the embedded digits

Accelerate's `prepare` takes the loaders only: a model that it wraps, or an optimizer that it scales for, would wait for
one backward pass of everything, which local learning does not have. Precision, accumulation and clipping are asked of
LocalTrainer. One device.
"""

import sys

import torch

import auglocal_ext

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("this program needs Accelerate: pip install accelerate") from error


def fit(model, train_loader, test_loader, epochs, **options):
    """Trains a model in place; returns the accuracy on the test loader after each epoch.

    options: of `auglocal_ext.LocalTrainer`.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"LocalTrainer runs in one process, given {accelerator.num_processes}: start one")
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)
    trainer = auglocal_ext.LocalTrainer(model.to(accelerator.device), **options)
    accuracies = []
    for epoch in range(epochs):
        trainer.set_learning_rate_factor(auglocal_ext.optim.cosine(epoch, epochs))
        for images, labels in train_loader:
            result = trainer.step(images, labels)
        trainer.check()
        accuracies.append(auglocal_ext.evaluate(model, test_loader))
        accelerator.print(f"epoch {epoch + 1}: loss {result.loss:.3f}, accuracy {accuracies[-1]:.1%}")
    return accuracies


def main():
    source = auglocal_ext.data.load("digits", 32)
    train, test = (
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*loader, strict=True))), 32, shuffle=mixed
        )
        for loader, mixed in ((source.train, True), (source.test, False))
    )
    torch.manual_seed(0)
    fit(auglocal_ext.models.resnet20(10), train, test, 3, modules=2, auxiliary="light")


if __name__ == "__main__":
    sys.exit(main())
