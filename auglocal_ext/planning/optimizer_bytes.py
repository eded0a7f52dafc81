"""What optimizers hold, and what one needs for a moment in its step: it is made and stepped without data."""

import functools

import torch
from torch import nn

from ..common.memory import LiveBytes, bytes_of
from ..engine.as_real import RealLayouts
from ..optim import make_optimizer, takes_names

__all__ = ["OptimizerBytes"]


class OptimizerBytes:
    """(module, trains) -> (bytes of its optimizer's state, bytes that a step needs for a moment); equal shapes are
    probed once. What gets no gradient, because it or all its module is frozen, has state only where the optimizer makes
    that at the start.

    Args:
        factory: see `auglocal_ext.train`.
        dtype, device: of the real parameters.
        names: parameter -> name, of the model's, for a factory that looks at them.
    """

    def __init__(self, factory, dtype, device, names):
        self.factory, self.dtype, self.device = factory, dtype, device
        self.names = names if takes_names(factory) else None
        self._known = {}

    def __call__(self, module, head=None, index=0, trains=True):
        """
        Args:
            module: a local module, or a part of one.
            head: its LocalHead, where that is only a part of it.
            index: of the local module, as names of its aux net have it.
            trains: whether it has a loss.
        """
        names = {}
        if self.names is not None:
            names = {p: f"aux_nets.{index}.{n}" for n, p in (head or module).named_parameters()} | self.names
        parameters = [(names.get(p), p) for p in module.parameters()]
        trained = [(name, p) for name, p in parameters if trains and p.requires_grad]
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
        return bool(self._probe([(None, None)]).state)

    def _probe(self, named):
        """An optimizer of one value, called as the first of these is."""
        one = nn.Parameter(torch.zeros(1, dtype=self.dtype, device=self.device))
        return make_optimizer(self.factory, [(name or "", one) for name, _ in named[:1]])

    def _of(self, named):
        trained = tuple((name, tuple(p.shape), p.stride(), p.dtype) for name, p in named)
        if trained not in self._known:
            try:
                state, scratch = self._two_steps(trained, "meta") if trained else (0, 0)
            except Exception:  # one that needs values: it branches on them, or has kernels for real memory only
                state, scratch = self._two_steps(trained, self.device)
            fused = trained and all(group.get("fused") for group in self._probe(named).param_groups)
            self._known[trained] = state, 0 if fused else scratch
        return self._known[trained]

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
