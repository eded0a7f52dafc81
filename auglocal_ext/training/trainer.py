"""The training step of local learning.

A step goes through the local modules from the input to the output. Each module's loss is differentiated at
once; its parameters are stepped, its gradients and activations freed, and only its detached output goes on to
the next module. No loss is ever summed over modules.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from ..backbone.families import as_backbone
from ..common import checks
from ..common.memory import tensors_of
from ..distributed.faults import telling
from ..engine.criterion import as_criterion
from ..optim import sgd
from ..planning.result import Plan
from ..planning.stepping import Stepping
from ..rules.auxiliary import Auxiliary
from ..rules.by_name import as_rule
from ..rules.cutting import as_recompute, assert_apart, cut, local_heads
from ..rules.rule import Rule
from .batch import checked, raise_refused, right_answers
from .errors import check_optimizers, check_parameters, check_plan, say_where_it_stopped
from .local_module import LocalModule
from .planned import current_programs, plan_batch
from .ranks import begin_alike
from .state import load_state, state_of
from .step_result import StepResult
from .stepping import Stepper, optimizers_of, set_learning_rate_factor, step_module
from .watch import Watch

__all__ = ["LocalTrainer", "StepResult"]


class LocalTrainer:
    """Trains a model in place, one call of `step` a batch, for people with their own loop::

        trainer = LocalTrainer(model, depth=4)
        for images, labels in loader:
            result = trainer.step(images, labels)

    The model keeps its class, its keys and its behaviour; no hook is left on it. The step runs programs made of its
    modules (see `auglocal_ext.engine.program`): hooks on parameters run; hooks on modules do not, but on what runs by
    autograd, and one warning names the first that does not. A module's gradients are gone before the next one's exist,
    but where they are accumulated.

    Between steps modules may be switched between training and eval mode, statistics of normalisations on and off, and
    parameters be frozen: the next step goes by it, after planning again. A model wholly in eval mode is put into
    training mode. What is before the first parameter that trains runs forward only; so does a local module whose units
    are all frozen, and its loss reads NaN. What was replaced, or moved to another dtype or device, is refused before
    anything changes.

    Where torch.distributed is initialised with several ranks, each makes a trainer of the same model and steps it by
    its own batches, as many as the others. Weights are rank 0's from the start; gradients are averaged over the ranks,
    those of a module in one message that is under way while the next module computes; running statistics are each
    rank's own, and rank 0's are those to save. Where a rank fails the others raise `distributed.faults.RankFailed`, and
    another trainer is to be made.

    Args:
        model: see `as_backbone`. It is trained on the device it is on.
        rule: one of `auglocal_ext.rules.RULES` by name, or a Rule of your own; see `auglocal_ext.Rule`.
        depth, form, auxiliary: of rule "auglocal"; see `auglocal_ext.rules.AugLocal`.
        modules: K, to cut the model into K local modules; None: where the rule says, a network that the authors of the
            rules did not cut into two. For a cut that fits a memory budget pass plan.
        borders: the number of the last unit of each module but the last, from 0, to cut there instead.
        units: names, to say what the units are; see `as_backbone`.
        plan: from `auglocal_ext.plan` of this model, under a memory budget for instance: its cut and all else that
            it was made with are taken from it, and its step is run, without planning again.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module; see `auglocal_ext.train`. Default:
            SGD with Nesterov momentum 0.9, weight decay 1e-4, and the learning rate for batches of 128, 0.1.
        criterion, sync_batch_norm: see `auglocal_ext.train`.
        precision: "fp32", "bf16" or "fp16"; see `auglocal_ext.train`.
        recompute: run convolutions again in the backward instead of keeping their outputs, of every unit and aux net or
            of the units of these names: gradient checkpointing, with BatchNorm's statistics updated once.
        accumulate: see `auglocal_ext.train`. Every accumulate-th `step` steps the optimizers, and `flush` does by a
            group that is not whole.
        clip_norm, clip_value, clip, ema: see `auglocal_ext.train`.
        image_size: pixels along a side of the images, or (height, width), for a rule whose nets depend on it (predsim,
            dgl, infopro). Default: 32 for the CIFAR networks, for others 224, or where the model takes none of these
            the size that it takes. Other sizes may follow where they need no other nets.

    Attributes:
        local_modules: list of nn.Module, x -> (features, logits); they share the model's weights.
        aux_nets: nn.ModuleList, one LocalHead for each local module but the last: features -> logits, with the net of
            an extra loss. With the model's, its state_dict and the optimizers' are all that a step changes.
        units: tuple, the names of the backbone's units.
        optimizers: list, one per local module; change their learning rates between steps as you like.
        plan: `auglocal_ext.Plan`, once a first batch has told its shape.
        nonfinite: "stop", or "skip": to leave a module out of a step in which its loss or a gradient is not finite; see
            `auglocal_ext.train`. Set it as you like, on several ranks alike.
        skipped_steps: list, of each module how many steps it was left out of.
        module_hits: (modules,), int64: right answers of each module's head so far; set it to zero when you like. Of
            soft labels the class of the largest share is right; where the label is ignored no answer is.

    Raises:
        ValueError, TypeError: the model cannot be cut or trained, an argument is out of the range that it allows, an
            optimizer does not fit, or plan is of another model or given with what it tells.
        distributed.faults.RankFailed: another rank stopped, or did not answer.
    """

    @telling()
    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        depth: int | str = 4,
        *,
        plan: Plan | None = None,
        rule: str | Rule | type[Rule] = "auglocal",
        form: str | None = None,
        auxiliary: str | Auxiliary | Callable = "paper",
        modules: int | None = None,
        units: Iterable[str] | None = None,
        borders: Iterable[int] | None = None,
        optimizer: Callable | None = None,
        criterion: Callable | None = None,
        sync_batch_norm: bool = False,
        precision: str = "fp32",
        recompute: bool | Iterable[str] = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        clip: str = "module",
        ema: float | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        self.stepping = Stepping(accumulate, clip_norm, clip_value, clip, ema)
        if plan is not None:
            beside = (depth, rule, form, auxiliary, modules, borders, units, optimizer, criterion, precision, recompute)
            alone = beside == (4, "auglocal", None, "paper", None, None, None, None, None, "fp32", False)
            check_plan(plan, model, alone and self.stepping == Stepping() and not sync_batch_norm)
            self.stepping, sync_batch_norm = plan.origin.stepping, plan.origin.sync_batch_norm
            rule, borders, precision = plan.origin.rule, plan.borders, plan.precision
            recompute, optimizer, criterion = plan.origin.recompute, plan.origin.optimizer, plan.origin.criterion
            image_size, units = image_size or plan.input_shape[2:], plan.units
        checks.check_precision(precision)
        criterion = as_criterion(criterion)
        backbone = as_backbone(model, units)
        backbone.say_what_is_left_out()
        rule = as_rule(rule, depth, form, auxiliary)
        self._spans = cut(backbone, rule, modules, borders)
        check_parameters(model)
        first = next(model.parameters())
        self.model, self.precision, self.plan = model, precision, plan
        self.units = tuple(unit.name for unit in backbone.units)
        self.recompute = rule.recompute or as_recompute(recompute, backbone)
        self.sync_batch_norm = sync_batch_norm
        self._backbone, self._rule = backbone, rule
        self.device, self.dtype = first.device, first.dtype
        self._image_size = _pair(image_size or backbone.made_for)
        heads = [head.to(self.device, self.dtype) for head in self._make_heads(self._image_size)]
        self.aux_nets = nn.ModuleList(heads[:-1])
        self.local_modules = []
        for span, head in zip(self._spans, heads, strict=True):
            units = [unit.module for unit in span.of(backbone.units)]
            self.local_modules.append(LocalModule(units, head))
        assert_apart(self.local_modules, {p: name for name, p in model.named_parameters()})
        self.criterion = criterion.on(self.device, self.dtype, backbone.num_classes)
        self._optimizer = optimizer or sgd(128)
        self.optimizers = optimizers_of(self._optimizer, model, self.aux_nets, self.local_modules)
        self._made_optimizers = list(self.optimizers)
        self.nonfinite, self.skipped_steps = "stop", [0] * len(self.local_modules)
        scaled = self.device if precision == "fp16" else None
        self.stepper = Stepper(self.stepping, model, self.local_modules, self.optimizers, self.skipped_steps, scaled)
        self._watch = self._watched()
        self._programs = self._planned_for = self._programmed_modes = None  # what plan and programs were made for
        if plan is not None:
            self._planned_for = self._watch.modes_in_training(), plan.origin.memory_format, self.dtype
        self.module_hits = torch.zeros(len(self.local_modules), dtype=torch.int64, device=self.device)
        self._hooks_run: set[nn.Module] = set()  # the modules whose hooks a step runs
        self._said: set[str] = set()  # what was warned of
        self._refused = torch.zeros(3, dtype=torch.bool, device=self.device)  # images, labels, soft labels
        self._values_are_at_hand = self.device.type == "cpu"  # elsewhere reading one waits for the device
        begin_alike(self)

    def __getstate__(self):
        """For pickle and deepcopy: what is made of the model is made anew."""
        made = ("_backbone", "_watch", "_programs", "_hooks_run")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state):
        vars(self).update(state)
        self._backbone, self._watch = as_backbone(self.model, self.units), self._watched()
        self._programs, self._hooks_run = None, set()

    def _watched(self):
        return Watch({"": self.model, "aux_nets": self.aux_nets})

    @telling()
    @torch.inference_mode(False)
    def step(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult:
        """One training step of every local module.

        Args:
            images: (N, channels, H, W), floating point, on the model's device; N at least 2. Its memory format,
                contiguous or channels_last, is that of the whole step.
            labels: (N,), int64, from 0 to num_classes - 1 or the criterion's ignore_index; or soft ones, (N,
                num_classes), of the model's dtype, as MixUp and CutMix make them.

        Returns:
            StepResult. Nothing waits for the device until one of its values is read.

        Raises:
            ValueError, TypeError: the batch does not fit, before any weight changed. What only its values
                tell (labels out of range, images that are not finite) is raised at once on the CPU; on other
                devices it is flagged, the step is taken with harmless values in their place, its losses read NaN, and
                `check` raises. Also where modules, parameters or optimizers were replaced since the trainer was made.
            distributed.faults.RankFailed: another rank stopped, or did not answer.

        What else stops a step, as torch.OutOfMemoryError, has in its message how far the step came.
        """
        self._watch.check()
        check_optimizers(self.optimizers, self._made_optimizers)
        images, labels, refused = checked(self, images, labels)
        modes = plan_batch(self, images, labels)
        if images.is_inference():  # which autograd cannot use
            images, labels = images.clone(), labels.clone()
        for module in self.local_modules:
            module.head.follow(self._backbone.classifier)
        inputs, modules = [images], current_programs(self, modes)
        # Made once, so that what a step holds does not depend on how many modules are done.
        losses = torch.full((len(modules),), torch.nan, dtype=self.dtype, device=self.device)
        for index, module in enumerate(modules):
            logits = None  # the module before's
            try:
                # The list hands its only tensor over: no name here keeps a module's input longer than the module does.
                skip, name = self.nonfinite == "skip", f"local module {index}"
                features, logits, loss = step_module(module, self.stepper, index, inputs, labels, images, skip, name)
            except BaseException as error:
                stepped = self.stepper.drop(index)
                say_where_it_stopped(error, index, len(modules), stepped, self.plan, self.device)
                raise
            if loss is not None:
                losses[index] = loss
                self.module_hits[index] += right_answers(logits, labels, self.criterion.ignore_index)
            inputs.append(features)
            del features, loss
        if refused is not None:
            losses = torch.where(refused, torch.nan, losses)
        return StepResult(losses[-1], logits, losses, tuple(module.loss is not None for module in modules))

    @telling()
    @torch.inference_mode(False)
    def flush(self) -> None:
        """Steps by what is accumulated of fewer than `accumulate` batches, if any, divided by how many there are."""
        self.stepper.flush()

    @property
    def ema_model(self) -> nn.Module | None:
        """The averaged model, of the trained one's class and on its device; None without ema."""
        return None if self.stepper.average is None else self.stepper.average.module

    @torch.inference_mode(False)
    def backward(
        self, index: int, features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None = None
    ) -> tuple:
        """Forward and backward of one local module, leaving its gradients in its parameters, or adding to what is there
        where they are accumulated.

        Args:
            index: of the local module, from 0.
            features: the module's input, of module 0 the images.
            labels: see `step`.
            images: the step's, (N, channels, H, W), for a rule with a loss that looks at them.

        Returns:
            (features, logits, loss): the module's output (None for the last one), its head's logits (N, num_classes)
            and its loss (), all detached; None of both where its units are all frozen.
        """
        return self._current_programs()[index].run([features], labels, images)

    @torch.inference_mode(False)
    def plan_for(self, images: torch.Tensor, labels: torch.Tensor | None = None, compare: bool = False) -> None:
        """Plans the step where no plan fits, which `step` does by itself: for a first batch, one that is larger or has
        another size of images or memory format, for the first soft labels, and after modes or frozen parameters have
        changed. A smaller batch runs on the plan there is. Puts the model into training mode if it is in eval mode as a
        whole. The plan is then in `plan`.

        Args:
            images: (N, channels, H, W), of which shape, dtype and memory format count.
            labels: see `step`; None: class numbers.
            compare: also find out what the step costs otherwise, `plan.comparison`.

        Raises:
            ValueError, TypeError: the images do not fit the model or the rule.
        """
        plan_batch(self, images, labels, compare)

    def _make_heads(self, size):
        return local_heads(self._backbone, self._rule, self._spans, (self._backbone.image_channels, *size))

    def _current_programs(self, modes=None):
        return current_programs(self, modes)

    def _warn(self, text, once=None):
        """Once in the trainer's life."""
        if (once or text) not in self._said:
            self._said.add(once or text)
            warnings.warn(text, stacklevel=4)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            ValueError: a batch since the last call was refused there; see `step`.
        """
        raise_refused(self)

    def set_learning_rate_factor(self, factor: float) -> None:
        """Sets every learning rate to `factor` times what it was when the optimizers were made.

        Raises:
            ValueError: factor is no finite number of at least 0; no learning rate has changed.
        """
        set_learning_rate_factor(self.optimizers, checks.learning_rate_factor(factor, "factor must be"))

    def tensors(self):
        """Every tensor that training keeps between steps: parameters, buffers, optimizer state, `module_hits`, the
        criterion's, and what accumulate and ema keep."""
        yield self.module_hits
        yield from self.criterion.tensors
        for module in (self.model, self.aux_nets):
            yield from tensors_of(module)
        yield from self.stepper.tensors()

    def state_dict(self):
        """Everything that the next step depends on: weights, auxiliary nets, optimizers, batches that are accumulated,
        what is frozen or in eval mode, random number generators.

        Returns:
            dict, which torch.save saves and torch.load loads with weights_only=True. Its tensors are the trainer's own.
        """
        return state_of(self)

    def load_state_dict(self, state):
        """Puts the trainer where `state_dict` found one that was made as it is: on a CPU the next steps are the same to
        the bit.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: it is of another model, rule, cut, optimizer or version. Nothing has changed then.
        """
        load_state(self, state)

    @property
    def loss_scales(self) -> list[float]:
        """What each local module's loss is multiplied by, with precision "fp16"; else none. Waits for the device."""
        return [scaler.get_scale() for scaler in self.stepper.scalers]

    @property
    def image_channels(self) -> int:
        """Channels of the images that the model takes."""
        return self._backbone.image_channels

    @property
    def num_classes(self) -> int:
        """How many logits the model's classifier has."""
        return self._backbone.num_classes

    def check_images(self, images, name="images"):
        """Raises ValueError or TypeError unless the images' shape and dtype fit the model; `name` is what the message
        calls them."""
        channels, half = self.image_channels, self.precision != "fp32"
        checks.check_images(images, self.dtype, channels=channels, half=half, name=name)
