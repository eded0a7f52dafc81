"""The exponential moving average of a model's weights."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..common.messages import first_line

__all__ = ["ModelAverage"]


class ModelAverage(AveragedModel):
    """torch's AveragedModel with an exponential average of parameters and buffers, BatchNorm's statistics included.

    The first `update_parameters` copies the model. A copy of this can be pickled.

    Args:
        model: left as it is; `module` is one like it, on its device.
        decay: what the average keeps of itself in each update.

    Raises:
        ValueError: the model cannot be copied.
    """

    def __init__(self, model, decay):
        try:
            super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be copied, as ema needs it: {first_line(error)}; train it without ema"
            ) from error
        self.module.zero_grad(set_to_none=True)
        self.decay = decay

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "multi_avg_fn"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.multi_avg_fn = get_ema_multi_avg_fn(self.decay)
