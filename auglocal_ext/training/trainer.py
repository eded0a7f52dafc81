"""The training step of local learning.

A step goes through the local modules from the input to the output. Each module's loss is differentiated at
once; its parameters are stepped, its gradients and activations freed, and only its detached output goes on to
the next module. No loss is ever summed over modules.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from ..backbone.families import as_backbone
from ..common import checks
from ..common.memory import tensors_of
from ..engine.criterion import as_criterion
from ..engine.tensors import layout_of
from ..optim import sgd
from ..planning.comparison import compared
from ..planning.module_nodes import programs
from ..planning.planner import Planner, train_mode
from ..planning.result import Plan
from ..planning.stepping import Stepping
from ..rules.auxiliary import Auxiliary
from ..rules.by_name import as_rule
from ..rules.cutting import as_recompute, assert_apart, cut, local_heads
from ..rules.rule import Rule
from .errors import check_optimizers, check_parameters, check_plan, say_where_it_stopped
from .local_module import LocalModule
from .state import load_state, state_of
from .step_result import StepResult
from .stepping import Stepper, optimizers_of, set_learning_rate_factor
from .watch import Watch

__all__ = ["LocalTrainer", "StepResult"]


class LocalTrainer:
    """Trains a model in place, one call of `step` a batch, for people with their own loop.

        trainer = LocalTrainer(model, depth=4)
        for images, labels in loader:
            result = trainer.step(images, labels)

    The model keeps its class, its keys and its behaviour; no hook is left on it. The step runs programs made of its
    modules (see `auglocal_ext.engine.program`): hooks on parameters run; hooks on modules do not, but on what runs by
    autograd, and one warning names the first that does not. A module's gradients are gone before the next one's exist,
    but where they are accumulated.

    Between steps modules may be switched between training and eval mode, statistics of normalisations on and off, and
    parameters be frozen: the next step goes by it, after planning again. A model wholly in eval mode is put into
    training mode. What was replaced, or moved to another dtype or device, is refused before anything changes.

    Args:
        model: see `as_backbone`. It is trained on the device it is on.
        rule: one of `auglocal_ext.rules.RULES` by name, or a Rule of your own; see `auglocal_ext.Rule`.
        depth, form, auxiliary: of rule "auglocal"; see `auglocal_ext.rules.AugLocal`.
        modules, borders: where the model is cut, if not where the rule says; see `auglocal_ext.rules.cut`. For a cut
            that fits a memory budget pass plan.
        plan: from `auglocal_ext.plan` of this model, under a memory budget for instance: its cut and all else that
            it was made with are taken from it, and its step is run, without planning again.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module; see `auglocal_ext.train`. Default:
            SGD with Nesterov momentum 0.9, weight decay 1e-4, and the learning rate for batches of 128, 0.1.
        criterion: the loss of every local module's head and of the classifier: None, the mean cross-entropy, or
            torch.nn.CrossEntropyLoss(label_smoothing=...).
        precision: "fp32", or "bf16": features in bfloat16 under autocast, parameters and statistics in fp32.
        recompute: run convolutions again in the backward instead of keeping their outputs, of every unit and aux net or
            of the units of these names: gradient checkpointing, with BatchNorm's statistics updated once.
        accumulate, clip_norm, clip_value, clip, ema: see `auglocal_ext.train`. Every accumulate-th `step` steps the
            optimizers, and `flush` does by a group that is not whole.
        image_size: (height, width) of the images, for a rule whose nets depend on it (predsim, dgl, infopro). Default:
            32 for the CIFAR networks, 224 for others. Other sizes may follow where they need no other nets.

    Attributes:
        local_modules: list of nn.Module, x -> (features, logits); they share the model's weights.
        aux_nets: nn.ModuleList, one LocalHead for each local module but the last: features -> logits, with the net of
            an extra loss. With the model's, its state_dict and the optimizers' are all that a step changes.
        optimizers: list, one per local module; change their learning rates between steps as you like.
        plan: `auglocal_ext.Plan`, once a first batch has told its shape.
        nonfinite: "stop", or "skip": to leave a module out of a step in which its loss or a gradient is not finite; see
            `auglocal_ext.train`. skipped_steps: of each module, how many.
        module_hits: (modules,), int64: right answers of each module's head so far; set it to zero when you like.
    """

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
        borders: Iterable[int] | None = None,
        optimizer: Callable | None = None,
        criterion: nn.CrossEntropyLoss | None = None,
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
            beside = (depth, rule, form, auxiliary, modules, borders, optimizer, criterion, precision, recompute)
            alone = beside == (4, "auglocal", None, "paper", None, None, None, None, "fp32", False)
            check_plan(plan, model, alone and self.stepping == Stepping())
            self.stepping = plan.origin.stepping
            rule, borders, precision = plan.origin.rule, plan.borders, plan.precision
            recompute, optimizer, criterion = plan.origin.recompute, plan.origin.optimizer, plan.origin.criterion
            image_size = image_size or plan.input_shape[2:]
        checks.check_precision(precision)
        self.criterion = as_criterion(criterion)
        backbone = as_backbone(model)
        backbone.say_what_is_left_out()
        rule = as_rule(rule, depth, form, auxiliary)
        self._spans = cut(backbone, rule, modules, borders)
        check_parameters(model)
        first = next(model.parameters())
        self.model, self.precision, self.plan = model, precision, plan
        self.recompute = rule.recompute or as_recompute(recompute, backbone)
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
        self._optimizer = optimizer or sgd(128)
        self.optimizers = optimizers_of(self._optimizer, model, self.aux_nets, self.local_modules)
        self._made_optimizers = list(self.optimizers)
        self.nonfinite, self.skipped_steps = "stop", [0] * len(self.local_modules)
        self.stepper = Stepper(self.stepping, model, self.local_modules, self.optimizers, self.skipped_steps)
        self._watch = self._watched()
        self._programs = self._planned_for = self._programmed_modes = None  # what plan and programs were made for
        if plan is not None:
            self._planned_for = self._watch.modes_in_training(), plan.origin.memory_format, self.dtype
        self.module_hits = torch.zeros(len(self.local_modules), dtype=torch.int64, device=self.device)
        self._hooks_run: set[nn.Module] = set()  # the modules whose hooks a step runs
        self._said: set[str] = set()  # what was warned of
        self._refused = torch.zeros(2, dtype=torch.bool, device=self.device)  # images, labels
        self._values_are_at_hand = self.device.type == "cpu"  # elsewhere reading one waits for the device

    def __getstate__(self):
        """For pickle and deepcopy: what is made of the model is made anew."""
        made = ("_backbone", "_watch", "_programs", "_hooks_run")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state):
        vars(self).update(state)
        self._backbone, self._watch = as_backbone(self.model), self._watched()
        self._programs, self._hooks_run = None, set()

    def _watched(self):
        return Watch({"": self.model, "aux_nets": self.aux_nets})

    @torch.inference_mode(False)
    def step(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult:
        """One training step of every local module.

        Args:
            images: (N, channels, H, W), floating point, on the model's device; N at least 2. Its memory format,
                contiguous or channels_last, is that of the whole step.
            labels: (N,), int64, from 0 to num_classes - 1.

        Returns:
            StepResult. Nothing waits for the device until one of its values is read.

        Raises:
            ValueError, TypeError: the batch does not fit, before any weight changed. What only its values
                tell (labels out of range, images that are not finite) is raised at once on the CPU; on other
                devices it is flagged, the step is taken with those values replaced by zeros, its losses read
                NaN, and `check` raises.
        """
        self._watch.check()
        check_optimizers(self.optimizers, self._made_optimizers)
        images, labels, refused = self._check_batch(images, labels)
        modes = self._plan_for(images)
        if images.is_inference():  # which autograd cannot use
            images, labels = images.clone(), labels.clone()
        for module in self.local_modules:
            module.head.follow(self._backbone.classifier)
        inputs, modules = [images], self._current_programs(modes)
        # Made once, so that what a step holds does not depend on how many modules are done.
        losses = torch.empty(len(modules), dtype=self.dtype, device=self.device)
        for index, module in enumerate(modules):
            logits = None  # the module before's
            try:
                self.stepper.before(index, skip=self.nonfinite == "skip")
                # The list hands its only tensor over: no name here keeps a module's input longer than the module does.
                features, logits, loss = module.run(inputs, labels, images)
                self.stepper.after(index, loss)
            except BaseException as error:
                stepped = self.stepper.drop(index)
                say_where_it_stopped(error, index, len(modules), stepped, self.plan, self.device)
                raise
            losses[index] = loss
            self.module_hits[index] += (logits.argmax(1) == labels).sum()
            inputs.append(features)
            del features, loss
        if refused is not None:
            losses = torch.where(refused, torch.nan, losses)
        return StepResult(losses[-1], logits, losses)

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Steps by what is accumulated of fewer than `accumulate` batches, if any, divided by how many there are."""
        self.stepper.flush()

    @property
    def ema_model(self) -> nn.Module | None:
        """With ema the averaged model, of the trained one's class and on its device."""
        return None if self.stepper.average is None else self.stepper.average.module

    @torch.inference_mode(False)
    def backward(
        self, index: int, features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None = None
    ) -> tuple:
        """Forward and backward of one local module, leaving its gradients in its parameters, or adding to what is there
        where they are accumulated.

        Args:
            features: the module's input.
            images: the step's, for a rule with a loss that looks at them.

        Returns:
            (features, logits, loss): the module's output (None for the last one), its head's and its loss.
        """
        return self._current_programs()[index].run([features], labels, images)

    @torch.inference_mode(False)
    def plan_for(self, images: torch.Tensor, compare: bool = False) -> None:
        """Plans the step where no plan fits, which `step` does by itself: for a first batch, one that is larger or has
        another size of images or memory format, and after modes or frozen parameters have changed. A smaller batch runs
        on the plan there is. Puts the model into training mode if it is in eval mode as a whole.

        compare: also find out what the step costs otherwise, `plan.comparison`.
        """
        self._plan_for(images, compare)
        if compare and self.plan is not None and self.plan.comparison is None:  # it was planned before
            self.plan = compared(self._planner(), self.plan, images)

    def _planner(self):
        options = {"criterion": self.criterion, "backbone": self._backbone, "stepping": self.stepping}
        return Planner(self.model, self.precision, self._optimizer, self.recompute, **options)

    def _plan_for(self, images, compare=False):
        """`plan_for`; returns the modes that the plan is for, see `Watch.modes`."""
        self.check_images(images)
        if not self.model.training and train_mode(self.model):
            self._warn("the model was in eval mode as a whole: a step puts it into training mode, and leaves it there")
        shape, modes = tuple(images.shape), self._watch.modes()
        if self.plan is not None and (modes, *_kind(images)) == self._planned_for:
            planned = self.plan.input_shape
            if shape[1:] == planned[1:] and shape[0] <= planned[0]:
                if self._programs is None:  # the plan was given
                    self._rule.check_images(images)
                self._current_programs(modes)
                return modes
            warnings.warn(
                f"a batch of shape {shape} does not fit the plan for {planned}: planning again, which takes a moment; "
                f"give batches of one shape, the largest first",
                stacklevel=4,
            )
        self._rule.check_images(images)
        heads = [module.head for module in self.local_modules]
        self._check_size(heads, shape[2:])
        planner = self._planner()
        planned = planner.plan(self._spans, shape, self._rule, heads, images, self.optimizers)
        if compare or (self.plan is not None and self.plan.comparison is not None):
            planned = compared(planner, planned, images)
        if self.plan is not None:  # what is known of the cut
            planned = replace(planned, choice=self.plan.choice)
        self.plan, self._planned_for = planned, (modes, *_kind(images))
        self._programs = None
        self._current_programs(modes)  # here, not in the step: tracing leaves meta tensors behind for a while
        return modes

    def _make_heads(self, size):
        return local_heads(self._backbone, self._rule, self._spans, (self._backbone.image_channels, *size))

    def _check_size(self, heads, size):
        if size == self._image_size:
            return
        with torch.device("meta"):
            fitting = self._make_heads(size)
        if str(fitting[:-1]) != str(heads[:-1]):
            raise ValueError(
                f"the nets of rule {self._rule.name!r} were made for images of {self._image_size[0]}x"
                f"{self._image_size[1]} pixels, given {size[0]}x{size[1]}: pass LocalTrainer image_size={tuple(size)}"
            )

    def _current_programs(self, modes=None):
        """Each module's program, made anew after planning and where modes have changed. modes: where they are known."""
        modes = self._watch.modes() if modes is None else modes
        if self._programs is None or modes != self._programmed_modes:
            heads = [module.head for module in self.local_modules]
            autocast = torch.bfloat16 if self.precision == "bf16" else None
            planned = self.plan is not None and modes == self._planned_for[0]
            kept_gaps = [module.kept_gaps for module in self.plan.modules] if planned else None
            options = {"autocast": autocast, "recompute": self.recompute, "criterion": self.criterion}
            options["accumulate"] = self.stepping.accumulates
            self._programs = programs(self._backbone, self._spans, heads, kept_gaps, **options)
            self._programmed_modes = modes
            called = [island.call for program in self._programs for island in program.islands]
            self._hooks_run = {part for call in called if isinstance(call, nn.Module) for part in call.modules()}
        if "hooks" not in self._said and (path := self._watch.hooked(self._hooks_run)):
            self._warn(
                f"a hook on {path} does not run in a training step, nor does any other on a module that the step "
                f"computes by its own program; hooks on parameters run, and in evaluation all do", "hooks"
            )  # fmt: skip
        return self._programs

    def _warn(self, text, once=None):
        """Once in the trainer's life."""
        if (once or text) not in self._said:
            self._said.add(once or text)
            warnings.warn(text, stacklevel=4)

    def check(self) -> None:
        """Raises ValueError if a batch since the last call was refused on the device. Waits for the device."""
        images, labels = self._refused.tolist()
        self._refused.zero_()
        if images or labels:
            raise checks.bad_labels(self.num_classes) if labels else checks.bad_images()

    def set_learning_rate_factor(self, factor: float) -> None:
        """Sets every learning rate to `factor` times what it was when the optimizers were made.

        Raises:
            ValueError: factor is no finite number of at least 0; no learning rate has changed.
        """
        set_learning_rate_factor(self.optimizers, checks.learning_rate_factor(factor, "factor must be"))

    def tensors(self):
        """Every tensor that training keeps between steps: parameters, buffers, optimizer state, `module_hits`, and what
        accumulate and ema keep."""
        yield self.module_hits
        for module in (self.model, self.aux_nets):
            yield from tensors_of(module)
        yield from self.stepper.tensors()

    def state_dict(self):
        """Everything that the next step depends on: weights, auxiliary nets, optimizers, random number generators; what
        torch.save saves and torch.load loads with weights_only=True."""
        return state_of(self)

    def load_state_dict(self, state):
        """Puts the trainer where `state_dict` found one that was made as it is: on a CPU the next steps are the same to
        the bit. ValueError, with nothing changed, where the state is of another model, rule, cut or version."""
        load_state(self, state)

    @property
    def image_channels(self) -> int:
        return self._backbone.image_channels

    @property
    def num_classes(self) -> int:
        return self._backbone.num_classes

    def check_images(self, images, name="images"):
        """Raises ValueError or TypeError unless the images' shape and dtype fit the model."""
        channels, half = self.image_channels, self.precision == "bf16"
        checks.check_images(images, self.dtype, channels=channels, half=half, name=name)

    def _check_batch(self, images, labels):
        channels, half = self.image_channels, self.precision == "bf16"
        checks.check_batch(images, labels, self.device, self.dtype, channels=channels, half=half)
        if len(images) < 2:
            raise ValueError(f"a step needs at least 2 images for its batch statistics, given {len(images)}")
        not_finite = checks.not_finite(images, self.dtype)
        out_of_range = checks.out_of_range(labels, self.num_classes)
        if self._values_are_at_hand:
            if not_finite:
                raise checks.bad_images()
            if out_of_range:
                raise checks.bad_labels(self.num_classes, labels)
            return images, labels, None
        # Reading the flags would wait for the device, and a label out of range would end its context: keep the
        # flags, and take the step on values that harm nothing.
        images = images.nan_to_num(0, 0, 0)
        self._refused |= torch.stack([not_finite, out_of_range])
        return images, labels.clamp(0, self.num_classes - 1), not_finite | out_of_range


def _kind(images):
    return layout_of(images), images.dtype
