"""What optimizers hold, and what one needs for a moment in its step: it is made and stepped without data."""

import functools

import torch
from torch import nn

from ..common.memory import LiveBytes, bytes_of
from ..engine.as_real import RealLayouts
from ..optim import make_optimizer

__all__ = ["OptimizerBytes"]


class OptimizerBytes:
    """(module, trains) -> (bytes of its optimizer's state, bytes that a step needs for a moment); equal shapes are
    probed once. What gets no gradient, because it or all its module is frozen, has state only where the optimizer makes
    that at the start.

    Args:
        factory: see `auglocal_ext.train`.
        dtype, device: of the real parameters.
    """

    def __init__(self, factory, dtype, device):
        self.factory, self.dtype, self.device = factory, dtype, device
        self._known = {}

    def __call__(self, module, trains=True):
        parameters = list(module.parameters())
        trained = [p for p in parameters if trains and p.requires_grad]
        state, scratch = self._of(trained)
        if len(trained) < len(parameters) and self._begins_with_state:
            state = self._of(parameters)[0]
        return state, scratch

    def left(self, optimizer, trains):
        """Bytes of the state that a module's optimizer has besides: of parameters that got gradients before."""
        if self._begins_with_state:  # and all of it was counted
            return 0
        states = [state for p, state in optimizer.state.items() if not (trains and p.requires_grad)]
        return bytes_of(t for state in states for t in state.values() if isinstance(t, torch.Tensor))

    @functools.cached_property
    def _begins_with_state(self):
        return bool(self._probe().state)

    def _probe(self):
        """An optimizer of one value."""
        return make_optimizer(self.factory, [nn.Parameter(torch.zeros(1, dtype=self.dtype, device=self.device))])

    def _of(self, parameters):
        shapes = tuple((tuple(p.shape), p.stride(), p.dtype) for p in parameters)
        if shapes not in self._known:
            try:
                state, scratch = self._two_steps(shapes, "meta")
            except Exception:  # one that needs values: it branches on them, or has kernels for real memory only
                state, scratch = self._two_steps(shapes, self.device)
            fused = all(group.get("fused") for group in self._probe().param_groups)
            self._known[shapes] = state, 0 if fused else scratch
        return self._known[shapes]

    def _two_steps(self, trained, device):
        def zeros():
            return [torch.empty_strided(*like, dtype=dtype, device=device).zero_() for *like, dtype in trained]

        if not trained:
            return 0, 0
        parameters = [nn.Parameter(value) for value in zeros()]
        optimizer = make_optimizer(self.factory, parameters)
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
