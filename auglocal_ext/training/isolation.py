"""Whether local modules are isolated: no loss reaches another module's parameters."""

__all__ = ["assert_isolated"]


def assert_isolated(trainer, images, labels):
    """Checks that the loss of each local module reaches the parameters of that module and its head, all that are not
    frozen, and no others. Changes no parameter; BatchNorm's running statistics see the batch.

    Args:
        trainer: a `LocalTrainer`.
        images, labels: a batch, see `LocalTrainer.step`.

    Raises:
        AssertionError: it does not; names the parameters.
    """
    names = {p: name for name, p in trainer.model.named_parameters()}
    for index, module in enumerate(trainer.local_modules[:-1]):
        names |= {p: f"local_modules.{index}.head.{name}" for name, p in module.head.named_parameters()}
    held = [(parameter, parameter.grad) for parameter in names]  # of a group of batches under way
    for parameter in names:
        parameter.grad = None
    features = images
    for index, module in enumerate(trainer.local_modules):
        features, _, loss = trainer.backward(index, features, labels, images)
        reached = {p for p in names if p.grad is not None}
        own = {p for p in module.parameters() if p.requires_grad} if loss is not None else set()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if reached != own:
            wrong = ", ".join(sorted(names[p] for p in reached ^ own))
            raise AssertionError(f"the loss of local module {index} reaches, or misses, against its cut: {wrong}")
    for parameter, gradient in held:
        parameter.grad = gradient
