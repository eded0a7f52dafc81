"""What happens to a local module's gradients: they are accumulated, clipped, stepped by, and go."""

import torch
from torch import nn
from torch.amp import GradScaler
from torch.autograd.profiler import record_function

from ..distributed.reduction import Reduction
from ..optim import begin_momentum, make_optimizer
from .divergence import UndoWhereNotFinite
from .ema import ModelAverage

__all__ = [
    "Stepper",
    "first_learning_rates",
    "optimizers_of",
    "set_first_learning_rates",
    "set_learning_rate_factor",
    "step_module",
]


def optimizers_of(factory, model, aux_nets, modules):
    """The local modules' optimizers; for the factory see `auglocal_ext.train`."""
    names = {p: f"aux_nets.{name}" for name, p in aux_nets.named_parameters()}
    names |= {p: name for name, p in model.named_parameters()}
    return [make_optimizer(factory, [(names[p], p) for p in module.parameters()]) for module in modules]


def set_learning_rate_factor(optimizers, factor):
    """Sets every learning rate to `factor` times what it was at first."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def first_learning_rates(optimizers):
    """Of each group of each optimizer, before any factor."""
    return [[group.get("initial_lr", group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]


def set_first_learning_rates(optimizers, rates):
    """Puts them where `first_learning_rates` found them."""
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = group["initial_lr"] = rate


def step_module(program, stepper, index, inputs, labels, images, skip, name):
    """One local module's part of a step: forward, backward, and its optimizer's step where that is due.

    Args:
        program: its Program; for inputs, labels and images see `Program.run`.
        index: its number among the stepper's modules.
        skip: whether it is left out of the step where its loss or a gradient is not finite.
        name: what a profiler calls it.

    Returns:
        (features, logits, loss); see `Program.run`.
    """
    stepper.before(index, skip=skip)
    with record_function(name):
        features, logits, loss = program.run(inputs, labels, images, stepper.scale(index))
        stepper.after(index, loss)
    return features, logits, loss


class Stepper:
    """Steps the optimizers of a model's local modules.

    Batches go in groups of `settings.accumulate`. With groups of one a module's gradients are gone as soon as it is
    stepped. In larger ones they stay in their parameters, through the steps too: the next group is added to their
    memory. A step divides them by the number of batches in the group, clips them by value, then by norm, so that both
    bounds hold, and steps. A module is stepped behind its last backward of the group; where the norm is that of all
    gradients, all are behind the last module's.

    With several ranks a group's gradients are averaged over them before anything else, once a module and group: that
    begins behind the module's last backward and is waited for behind the next module's, so that it takes its time while
    that one computes. Until then the module's gradients stay, and its step waits.

    Args:
        settings: `planning.stepping.Stepping`.
        model: whose weights are averaged.
        optimizers: one per local module.
        modules: the local modules.
        skipped: of each module, how many steps it was left out of; counted on.
        scaled: None, or the device of losses that are scaled, for gradients in float16: each module's by a scale of its
            own, which halves where its gradients overflow, and then leaves it out of the step.
        begin: the number of the first of these modules among the model's.

    Attributes:
        count: batches in the group so far.
        average: `ModelAverage`, or None.
        reduction: `Reduction` of several ranks, or None.
    """

    def __init__(self, settings, model, modules, optimizers, skipped, scaled=None, begin=0):
        self.settings, self._model, self._modules, self._optimizers = settings, model, modules, optimizers
        self.average = None if settings.ema is None else ModelAverage(model, settings.ema)
        self.reduction = None if settings.ranks == 1 else Reduction(begin)
        self.count, self._skipped = 0, skipped
        self._spoilt = set()  # modules that are left out of the group's step
        self._undo = None
        self._one = None if scaled is None else torch.ones((), device=scaled)
        self.scalers = [] if scaled is None else [GradScaler(scaled.type) for _ in modules]
        self._make_scales()

    def scale(self, index):
        """What a module's loss is multiplied by, a tensor (), or None."""
        return self.scalers[index].scale(self._one) if self.scalers else None

    def _make_scales(self):
        """Makes the scalers' tensors, which they do themselves when they are needed first."""
        for index in range(len(self.scalers)):
            self.scale(index)

    @property
    def _ends_group(self):
        return self.count + 1 == self.settings.accumulate

    def before(self, index, skip):
        """Before a module's forward. skip: whether it is to be left out of the step where something is not finite."""
        self._forget_frozen(index)
        if not self.count:  # what an earlier group has left, or an earlier backward of the caller's
            self._clear(index)
        self._undo = UndoWhereNotFinite(self._modules[index]) if skip else None

    def after(self, index, loss):
        """After a module's backward; loss: None where it trains nothing."""
        if loss is None:
            self._optimizers[index].zero_grad(set_to_none=True)  # what accumulated before its units were frozen
        elif self._undo is not None and self._undo.needed(loss, gradients=not self.scalers):
            self._spoilt.add(index)
        self._undo = None
        last = index == len(self._modules) - 1
        if self._ends_group:
            self._end_module(index, last)
        if last:
            self.count += 1
            if self.count == self.settings.accumulate:
                self._end_group()

    def _end_module(self, index, last):
        """Behind a module's last backward of a group: steps the modules whose gradients are ready now."""
        if self.settings.clips_globally:
            if self.reduction is not None:
                self._reduce(index)
            if last:
                self._wait_for_all()
                self._step(range(len(self._modules)), self.count + 1)
        elif self.reduction is None:
            self._step_alone(index)
        else:  # the module before's first, so that its memory is free
            self._step_reduced()
            self._reduce(index)
            if last:
                self._step_reduced()

    def _step_alone(self, index):
        self._step([index], self.count + 1)
        if not self.settings.accumulates:
            self._clear(index)

    def _step_reduced(self):
        for index in self.reduction.wait():
            self._step_alone(index)

    def _reduce(self, index):
        self.reduction.start(index, self._modules[index].parameters())

    def _wait_for_all(self):
        if self.reduction is not None:
            list(self.reduction.wait())

    def flush(self):
        """Steps by what is accumulated of a group that is not whole."""
        if not self.count:
            return
        modules = range(len(self._modules))
        for index in modules:
            self._forget_frozen(index)
            if self.reduction is not None:
                self._reduce(index)
        self._wait_for_all()
        for together in [modules] if self.settings.clips_globally else [[index] for index in modules]:
            self._step(together, self.count)
        self._end_group()

    def drop(self, index=0):
        """Forgets the group, after what stopped its step in module `index`; returns how many modules have stepped."""
        stepped = index if self._ends_group and not self.settings.clips_globally else 0
        if self.reduction is not None:
            stepped = min([stepped, *self.reduction.pending])
            self.reduction.drop()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.count, self._spoilt, self._undo = 0, set(), None
        for index, scaler in enumerate(self.scalers):  # one that has unscaled, but not stepped, would do neither again
            self.scalers[index] = GradScaler(self._one.device.type)
            self.scalers[index].load_state_dict(scaler.state_dict())
        self._make_scales()
        return stepped

    def _clear(self, index):
        """Lets a module's gradients go, or where they are accumulated sets them to zero."""
        if not self.settings.accumulates:
            self._optimizers[index].zero_grad(set_to_none=True)
            return
        if gradients := [p.grad for p in self._modules[index].parameters() if p.grad is not None]:
            torch._foreach_zero_(gradients)

    def _forget_frozen(self, index):
        """Lets gradients go that were accumulated before their parameters were frozen; an optimizer would step them."""
        for parameter in self._modules[index].parameters() if self.settings.accumulates else ():
            if not parameter.requires_grad:
                parameter.grad = None

    def _step(self, group, batches):
        """Steps modules whose gradients, of so many batches, are clipped together."""
        for index in self._spoilt.intersection(group):
            self._skipped[index] += 1
        group = self._unscaled([index for index in group if index not in self._spoilt])
        parameters = [p for index in group for p in self._modules[index].parameters() if p.grad is not None]
        if parameters:
            self._average_and_clip(parameters, batches)
        for index in group:
            self._optimize(index)

    def _average_and_clip(self, parameters, batches):
        if batches > 1:
            torch._foreach_div_([p.grad for p in parameters], batches)
        if self.settings.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.settings.clip_value)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)

    def _unscaled(self, group):
        """The modules of a group whose gradients are as if nothing had been scaled; those that are clipped together are
        without the ones that have overflown, whose norm would spoil the others'."""
        if not self.scalers:
            return group
        finite = []
        for index in group:
            gradients = [p.grad for p in self._modules[index].parameters() if p.grad is not None]
            if not gradients:
                continue
            self.scalers[index].unscale_(self._optimizers[index])
            if self.settings.clips_globally and not nn.utils.get_total_norm(gradients).isfinite():
                self._optimize(index)  # which leaves it out
            else:
                finite.append(index)
        return finite

    def _optimize(self, index):
        begin_momentum(self._optimizers[index])
        if self.scalers:
            self.scalers[index].step(self._optimizers[index])
            self.scalers[index].update()
        else:
            self._optimizers[index].step()

    def _end_group(self):
        self.count, self._spoilt = 0, set()
        if self.average is not None:
            self.average.update_parameters(self._model)

    # ---- between steps -------------------------------------------------------------------------------------------

    def tensors(self):
        """Those that stay between steps: the optimizers' state, gradients and averages."""
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        if self.settings.accumulates:
            for module in self._modules:
                yield from (p.grad for p in module.parameters() if p.grad is not None)
        if self.average is not None:
            yield from (*self.average.parameters(), *self.average.buffers())
        for scaler in self.scalers:
            yield from (self._one, scaler._scale, scaler._growth_tracker)

    def state_dict(self):
        """A group under way, and the average, as plain values and tensors."""
        average = None if self.average is None else self.average.state_dict()
        return {
            "count": self.count,
            "gradients": self._gradients(),
            "spoilt": sorted(self._spoilt),
            "average": average,
            "scales": [scaler.state_dict() for scaler in self.scalers],
        }

    def load_state_dict(self, state):
        """Puts it where `state_dict` found one of the same modules and settings."""
        self.drop()
        self.count, self._spoilt = state["count"], set(state["spoilt"])
        self._put(state["gradients"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for scaler, saved in zip(self.scalers, state["scales"], strict=True):
            scaler.load_state_dict(saved)

    def __getstate__(self):
        """For pickle and deepcopy, which leave parameters' gradients out."""
        return vars(self) | {"gradients": self._gradients()}

    def __setstate__(self, state):
        gradients = state.pop("gradients")
        vars(self).update(state)
        self._put(gradients)
        self._make_scales()

    def _gradients(self):
        """Of a group under way, each module's."""
        return [[p.grad for p in module.parameters()] if self.count else [] for module in self._modules]

    def _put(self, gradients):
        for module, own in zip(self._modules, gradients, strict=True):
            for parameter, gradient in zip(module.parameters(), own, strict=False):
                if gradient is not None:
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
