"""Local learning inside a PyTorch Lightning Trainer: a LightningModule whose training step is a LocalTrainer's.

    python python/lightning_module.py            a few epochs on the embedded digits

Every local module is stepped as soon as its gradients exist, so the optimization is manual: Lightning brings loaders,
logging, callbacks and checkpoints, and leaves gradients alone. What it does with gradients (accumulation, clipping,
precision) is asked of LocalTrainer instead. One device.
"""

import sys
import warnings

import torch
import torch.nn.functional as F

import auglocal_ext

try:
    import lightning
except ImportError as error:
    raise ImportError("this program needs Lightning: pip install lightning") from error


class LocalLearning(lightning.LightningModule):
    """Trains an image classifier by local learning.

    Args:
        model: see `auglocal_ext.backbone.as_backbone`; it stays the plain model.
        options: of `auglocal_ext.LocalTrainer`, such as depth=4, modules=2, auxiliary="light", precision="bf16".
    """

    def __init__(self, model, **options):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.options = model, options
        self.trainer_of_modules = None  # made when the model is on its device

    def on_fit_start(self):
        trainer = self.trainer_of_modules = auglocal_ext.LocalTrainer(self.model, **self.options)
        if state := getattr(self, "_state", None):
            trainer.load_state_dict(state)

    def configure_optimizers(self):
        """None for Lightning: each local module has its own."""

    def training_step(self, batch, batch_index):
        result = self.trainer_of_modules.step(*batch)
        self.log("train_loss", result.loss, prog_bar=True)
        for index, loss in enumerate(result.module_losses):
            self.log(f"train_loss/module_{index}", loss)

    def on_train_epoch_end(self):
        self.trainer_of_modules.check()  # what only a batch's values tell
        self.trainer_of_modules.flush()

    def validation_step(self, batch, batch_index):
        images, labels = batch
        logits = self.model(images)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["local_learning"] = self.trainer_of_modules.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self._state = checkpoint["local_learning"]


def main():
    source = auglocal_ext.data.load("digits", 32)
    warnings.filterwarnings("ignore", "The .*_dataloader.* does not have many workers")
    torch.manual_seed(0)
    local = LocalLearning(auglocal_ext.models.resnet20(10), modules=2, auxiliary="light")
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, logger=False)
    trainer.fit(local, source.train, source.test)
    print(f"accuracy on the test images: {trainer.callback_metrics['val_accuracy']:.1%}")


if __name__ == "__main__":
    sys.exit(main())
