"""A local module."""

from torch import nn

__all__ = ["LocalModule"]


class LocalModule(nn.Module):
    """Consecutive units of the backbone and the LocalHead behind them: x -> (features, logits)."""

    def __init__(self, units, head):
        super().__init__()
        self.body, self.head = nn.Sequential(*units), head

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)
