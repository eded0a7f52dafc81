"""What optimizers hold, and what one needs for a moment in its step: it is made and stepped without data."""

import torch
from torch import nn

from ..common.memory import LiveBytes, bytes_of
from ..engine.as_real import RealLayouts
from ..optim import make_optimizer, takes_names

__all__ = ["OptimizerBytes", "frozen_state"]


class OptimizerBytes:
    """Module -> (bytes of its optimizer's state, bytes that a step needs for a moment); equal shapes are probed once.

    Args:
        factory: see `auglocal_ext.train`.
        dtype, device: of the real parameters.
        names: parameter -> name, of the model's, for a factory that looks at them.
    """

    def __init__(self, factory, dtype, device, names):
        self.factory, self.dtype, self.device = factory, dtype, device
        self.names = names if takes_names(factory) else None
        self._known = {}

    def __call__(self, module, head=None, index=0):
        """
        Args:
            module: a local module, or a part of one.
            head: its LocalHead, where that is only a part of it.
            index: of the local module, as names of its aux net have it.
        """
        names = (
            {} if self.names is None else {p: f"aux_nets.{index}.{n}" for n, p in (head or module).named_parameters()}
        )
        names |= self.names or {}
        trained = tuple(
            (names.get(parameter), tuple(parameter.shape), parameter.stride(), parameter.dtype)
            for parameter in module.parameters()
            if parameter.requires_grad
        )
        if trained not in self._known:
            self._known[trained] = self._probe(trained) if trained else (0, 0)
        return self._known[trained]

    def _probe(self, trained):
        """For parameters of (name, shape, strides, dtype)."""
        one = nn.Parameter(torch.zeros(1, dtype=self.dtype, device=self.device))
        probe = make_optimizer(self.factory, [(name, one) for name, *_ in trained[:1]])
        fused = all(group.get("fused") for group in probe.param_groups)
        try:
            state, scratch = self._two_steps(trained, "meta")
        except Exception:  # one that needs values: it branches on them, or has kernels for real memory only
            state, scratch = self._two_steps(trained, self.device)
        return state, 0 if fused else scratch

    def _two_steps(self, trained, device):
        def zeros():
            return [torch.empty_strided(*like, dtype=dtype, device=device).zero_() for _, *like, dtype in trained]

        parameters = [nn.Parameter(value) for value in zeros()]
        optimizer = make_optimizer(self.factory, [(like[0], p) for like, p in zip(trained, parameters, strict=True)])
        for parameter, gradient in zip(parameters, zeros(), strict=True):
            parameter.grad = gradient
        with RealLayouts(values=False):
            optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        state = [value for value in state if isinstance(value, torch.Tensor)]
        with LiveBytes([*parameters, *(p.grad for p in parameters), *state]) as live, RealLayouts(values=False):
            before = live.now
            optimizer.step()
        return bytes_of(state), live.peak - before


def frozen_state(optimizer):
    """Bytes of the state of an optimizer's frozen parameters."""
    states = [state for parameter, state in optimizer.state.items() if not parameter.requires_grad]
    return bytes_of(t for state in states for t in state.values() if isinstance(t, torch.Tensor))
