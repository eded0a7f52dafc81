"""The plan of one cut: its programs walked on meta tensors, at one batch shape."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..backbone.equivalence import assert_same_function
from ..backbone.families import as_backbone
from ..common.checks import AUTOCAST, check_precision
from ..common.memory import bytes_of, tensors_of
from ..common.meta import as_meta_copy, meta_copy
from ..engine.as_real import RealLayouts
from ..engine.criterion import as_criterion
from ..engine.emit import Phase
from ..engine.program import Program
from ..engine.tensors import layout_of
from ..engine.timeline import Timeline, fill, timeline
from ..engine.trace import Reader
from ..engine.walked_steps import WalkedSteps
from ..models import name_of
from ..optim import sgd
from ..rules import LocalHead
from ..rules.bp import BP
from ..rules.cutting import Span, assert_apart, borders_of, cut, head_behind, trains
from .module_nodes import module_program
from .optimizer_bytes import OptimizerBytes
from .origin import Origin, fingerprint
from .progress import Progress
from .result import ModulePlan, Plan
from .stepping import Stepping

__all__ = ["Planner", "train_mode"]


@dataclass(frozen=True)
class _Part:
    """A local module without data, and what of it is there all the time."""

    span: Span
    body: nn.ModuleList
    head: LocalHead
    module: nn.ModuleList  # of both
    trains: bool  # see `rules.cutting.trains`
    existing: list  # parameters and buffers
    state_bytes: int
    optimizer_bytes: int
    optimizer_scratch: int

    @property
    def with_gradients(self):
        """The parameters that get gradients."""
        return {p for p in self.module.parameters() if p.requires_grad and self.trains}


@dataclass(frozen=True)
class _Walk:
    """A local module's program, and what walking it told."""

    program: Program
    line: Timeline
    features: torch.Tensor | None  # without data
    kept_gaps: frozenset


class Planner:
    """Walks the programs of a model's local modules on meta tensors: nothing is computed, the model is not touched.

    Args:
        model: see `as_backbone`. In eval mode as a whole it is planned in training mode, which a step puts it into.
        precision, optimizer, recompute, criterion: see `auglocal_ext.train`.
        memory_format: of the images, where no batch tells it.
        backbone: of the model, where it was read already.
        clock: None, or what predicts times; see `calibration.load`.
        soft_labels: see `auglocal_ext.plan`.
        stepping: how optimizers step, see `Stepping`.
        sync_batch_norm: see `auglocal_ext.train`.

    Attributes:
        criterion: without data; given_criterion: as it was given.
        options: how the programs are built; see `module_nodes.module_program`.
        optimizer_bytes: see `OptimizerBytes`.
        progress: see `Progress`.
        steps: what is known of steps that were walked, see `WalkedSteps`.
    """

    def __init__(
        self,
        model,
        precision="fp32",
        optimizer=None,
        recompute=False,
        memory_format=torch.channels_last,
        backbone=None,
        criterion=None,
        clock=None,
        soft_labels=False,
        stepping=Stepping(),  # noqa: B008 - it cannot change
        sync_batch_norm=False,
    ):
        check_precision(precision)
        self.given_criterion, self.clock, self.soft_labels = as_criterion(criterion), clock, soft_labels
        self.stepping, self.sync_batch_norm = stepping, sync_batch_norm
        self.name, self.precision, self.recompute = name_of(model), precision, recompute
        self.factory, self.device = optimizer or sgd(128), next(model.parameters()).device
        self.fingerprint, self.memory_format = fingerprint(model), memory_format
        self.model, self.backbone = _meta_copies(model, backbone or as_backbone(model))
        train_mode(self.model)
        self.dtype = next(self.model.parameters()).dtype
        self.criterion = self.given_criterion.on("meta", self.dtype, self.backbone.num_classes)
        self.autocast = AUTOCAST[precision]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizer_bytes = OptimizerBytes(self.factory, self.dtype, self.device, names)
        self.reader, self.steps, self.progress = Reader(sync_batch_norm), WalkedSteps(), Progress()
        self._heads, self._same = {}, set()
        self._at_once, self._bp = {}, {}  # what `at_once` has planned, and `_bp_macs` walked
        self.options = {
            "autocast": self.autocast,
            "recompute": recompute,
            "criterion": self.criterion,
            "accumulate": stepping.accumulates,
            "trace": self.reader.trace,
            "device_type": self.device.type,
        }

    def with_recompute(self, recompute):
        """This planner with another `recompute`; what was read of the model serves both."""
        other = copy.copy(self)
        other.recompute, other.options = recompute, self.options | {"recompute": recompute}
        return other

    def at_once(self, shape, recompute=False, like=None):
        """The Plan of backpropagation, one module of all units, for batches of `shape`; made once. recompute: True, of
        gradient checkpointing. like: see `batch`."""
        key = tuple(shape), recompute, like is not None and (like.dtype, layout_of(like))
        if key not in self._at_once:
            planner = self.with_recompute(recompute)
            self._at_once[key] = planner.plan(cut(self.backbone, BP()), shape, BP(), like=like)
        return self._at_once[key]

    def batch(self, shape, like=None):
        """(images, labels) of a batch, on the meta device; like: images whose dtype and memory format it has."""
        # Two images at least: a BatchNorm of a map of one pixel cannot be traced with one.
        dtype, given = (self.dtype, self.memory_format) if like is None else (like.dtype, layout_of(like))
        size = (max(shape[0], 2), *shape[1:])
        images = torch.empty(size, dtype=dtype, device="meta", memory_format=given)
        if self.soft_labels:
            return images, torch.empty(len(images), self.backbone.num_classes, dtype=self.dtype, device="meta")
        return images, torch.empty(len(images), dtype=torch.int64, device="meta")

    def batch_bytes(self, images, labels):
        """Of a batch, and on a GPU of the step's own copy, in which what would do harm is replaced: see
        `training.batch.checked`."""
        return (2 if self.device.type == "cuda" else 1) * (images.nbytes + labels.nbytes)

    def plan(self, spans, shape, rule, heads=None, like=None, given_optimizers=()):
        """The Plan of a cut of the backbone for batches of `shape`.

        spans: see `rules.cutting.cut`.
        heads: the LocalHeads that the modules have already, or None to make them.
        like: see `batch`.
        given_optimizers: the modules' own, where there are any: for state of what got gradients before.
        """
        if heads is None:
            heads = self.heads(spans, shape, rule)
        else:
            heads = [*(meta_copy(head) for head in heads[:-1]), LocalHead(self.backbone.classifier)]
        parts = [self._part(*one) for one in zip(spans, heads, range(len(spans)), strict=True)]
        assert_apart([part.module for part in parts], {p: name for name, p in self.model.named_parameters()})
        images, labels = self.batch(shape, like)
        self._assert_same_function(images.to(self.dtype))
        words = [*(rule.describe(border) for border in borders_of(self.backbone, spans, shape[1:])), None]
        batch_bytes = self.batch_bytes(images, labels)
        constant = batch_bytes + len(parts) * self.module_bytes + self._scale_bytes + bytes_of(self.criterion.tensors)
        constant += sum(part.state_bytes + part.optimizer_bytes for part in parts)
        left = zip(given_optimizers, parts, strict=False)
        constant += sum(self.optimizer_bytes.left(optimizer, part.trains) for optimizer, part in left)
        stepping_bytes = sum(self.stepping.gradient_bytes(part.module) for part in parts if part.trains)
        stepping_bytes += self.stepping.average_bytes(self.model)
        constant += stepping_bytes
        scratch = self._step_scratch(parts)
        around = self._around(parts, scratch)
        with self.progress(f"planning batches of {shape[0]}"):
            walks = self._filled(parts, images, labels)
        modules = tuple(
            self._module_plan(index, part, walk, constant, around[index], scratch[index], words[index], shape)
            for index, (part, walk) in enumerate(zip(parts, walks, strict=True))
        )
        bp_macs = self._bp_macs(walks, images, labels)
        made_with = rule, self.recompute, self.factory, self.given_criterion, layout_of(images), self.soft_labels
        return Plan(
            self.name,
            rule.name,
            rule.depth,
            self.precision,
            shape,
            modules,
            batch_bytes,
            bp_macs,
            Origin(*made_with, self.fingerprint, self.stepping, self.sync_batch_norm),
            stepping_bytes=stepping_bytes,
        )

    def _part(self, span, head, index):
        body = nn.ModuleList(unit.module for unit in span.of(self.backbone.units))
        module, has_loss = nn.ModuleList((body, head)), trains(self.backbone, span)
        existing = [*tensors_of(body), *tensors_of(head)]
        of_optimizer = self.optimizer_bytes(module, head, index, has_loss)
        return _Part(span, body, head, module, has_loss, existing, bytes_of(set(existing)), *of_optimizer)

    def _step_scratch(self, parts):
        """Of each module, what its step needs for a moment: all modules' is behind the last one where they are clipped
        together."""
        clipped = [list(part.module.parameters()) if part.trains else [] for part in parts]
        if self.stepping.clips_globally:
            most = max(part.optimizer_scratch for part in parts)
            return [*[0] * (len(parts) - 1), max(most, self.stepping.clip_scratch(sum(clipped, [])))]
        scratch = [self.stepping.clip_scratch(parameters) for parameters in clipped]
        return [max(part.optimizer_scratch, clip) for part, clip in zip(parts, scratch, strict=True)]

    def _around(self, parts, scratch):
        """See `Stepping.bytes_around`."""
        return self.stepping.bytes_around([part.with_gradients for part in parts], scratch)

    def _filled(self, parts, images, labels):
        """The walks of the local modules, values kept rather than rebuilt where that raises neither the step's peak nor
        its activations'."""
        during = [waiting for waiting, _ in self._around(parts, [0] * len(parts))]
        first = self._walks(parts, images, labels, [frozenset()] * len(parts))
        tops = [max(walk.line.peak + more for walk, more in zip(first, during, strict=True)) - more for more in during]
        activations = max(walk.line.activations for walk in first)
        kept = [fill(w.program.gaps, w.line, top, activations) for w, top in zip(first, tops, strict=True)]
        walks = self._walks(parts, images, labels, kept, first)
        # Kept values change what is rebuilt from what: where that needs more after all, nothing is kept.
        pairs = zip(walks, tops, strict=True)
        high = [walk.line.peak > top or walk.line.activations > activations for walk, top in pairs]
        return [before if too_high else walk for before, walk, too_high in zip(first, walks, high, strict=True)]

    def _walks(self, parts, images, labels, kept_gaps, known=None):
        """Each local module walked, but for those that keep nothing where such a walk is `known`."""
        walks, x, source = [], images, "images"
        for index, (part, kept) in enumerate(zip(parts, kept_gaps, strict=True)):
            if known is not None and not kept:
                walk = known[index]
            else:
                self.progress.walked()
                program = module_program(self.backbone, part.span, part.head, source, kept_gaps=kept, **self.options)
                given = program, x, labels, [*part.existing, *self.criterion.tensors]
                line, features = timeline(*given, index > 0, images, self.clock, self.steps)
                walk = _Walk(program, line, features, kept)
            walks.append(walk)
            x, source = walk.features, walk.program.features
        return walks

    def _module_plan(self, index, part, walk, constant, around, scratch, aux_net, shape):
        """around: see `Stepping.bytes_around`. aux_net: in words; None: the classifier is the head."""
        line, last, of_head = walk.line, aux_net is None, _count(part.head)
        output = self.backbone.feature_shapes(shape[1:])[part.span.last]
        names = tuple(unit.name for unit in part.span.of(self.backbone.units))
        return ModulePlan(
            index=index,
            units=names,
            recomputed=names if self.recompute is True else tuple(n for n in names if n in (self.recompute or ())),
            output_shape=(shape[0], *output),
            aux_net=aux_net or "",
            parameters=_count(part.body) + of_head * last,
            aux_parameters=0 if last else of_head,
            state_bytes=part.state_bytes,
            frozen_parameters=_frozen(part.body) + last * _frozen(part.head),
            trains=part.trains,
            gradient_bytes=bytes_of(part.with_gradients),
            optimizer_bytes=part.optimizer_bytes,
            optimizer_scratch=scratch,
            kept_bytes=line.kept,
            activation_bytes=line.activations,
            peak_bytes=constant + max(line.peak + around[0], line.end + around[1]),
            macs=line.macs,
            rebuild_share=line.rebuild_share,
            islands=tuple(island.what for island in walk.program.by_autograd),
            timeline=line,
            kept_gaps=walk.kept_gaps,
            nanoseconds=self._nanoseconds(part, line),
        )

    def _nanoseconds(self, part, line):
        if self.clock is None:
            return None
        step = self.clock.optimizer(self.factory, part.module.parameters(), part.optimizer_bytes)
        return line.nanoseconds + step // self.stepping.accumulate

    def _bp_macs(self, walks, images, labels):
        """Multiply-accumulates of backpropagation. Where parts are frozen, only walking it tells."""
        if not _frozen(self.model):
            return _bp_macs([walk.line for walk in walks])
        if images.shape not in self._bp:
            whole = self._part(Span(0, len(self.backbone.units) - 1), LocalHead(self.backbone.classifier), 0)
            (walk,) = self.with_recompute(False)._walks([whole], images, labels, [frozenset()])
            self._bp[images.shape] = walk.line.macs
        return self._bp[images.shape]

    def _assert_same_function(self, images):
        """See `equivalence.assert_same_function`; once for images of a shape and layout."""
        key = images.shape, images.stride()
        if key not in self._same:
            assert_same_function(self.model, self.backbone, images, self.reader)
            self._same.add(key)

    def heads(self, spans, shape, rule):
        """The LocalHead behind each module, new ones on the meta device and last the classifier's."""
        borders = borders_of(self.backbone, spans, shape[1:])
        return [*(self._head(border, rule) for border in borders), LocalHead(self.backbone.classifier)]

    def heads_by_unit(self, rule, shape):
        """AugLocal's head behind each unit, the last one's being the classifier; made once, and one for those alike."""
        key = rule.depth, rule.form, rule.auxiliary, shape[1:]
        if key not in self._heads:
            units = [Span(unit, unit) for unit in range(len(self.backbone.units))]
            known, heads = {}, []
            for border in borders_of(self.backbone, units, shape[1:]):
                of_net = rule.net_key(border)
                if of_net not in known:
                    known[of_net] = self._head(border, rule)
                heads.append(known[of_net])
            self._heads[key] = [*heads, LocalHead(self.backbone.classifier)]
        return self._heads[key]

    def _head(self, border, rule):
        with torch.device("meta"), RealLayouts():
            made = head_behind(border, rule)
        return as_meta_copy(made.to(self.dtype))

    @property
    def module_bytes(self):
        """Of a local module's loss and its count of right answers, in tensors of all modules', and its loss scale with
        how often that was right."""
        scale = torch.float32.itemsize + torch.int32.itemsize if self.scaled else 0
        return self.dtype.itemsize + torch.int64.itemsize + scale

    @property
    def scaled(self):
        """Whether losses are scaled, as gradients in float16 must be."""
        return self.autocast is torch.float16

    @property
    def _scale_bytes(self):
        """Of what a loss scale is multiplied with, and of the product."""
        return 2 * torch.float32.itemsize if self.scaled else 0

    def state_bytes(self):
        """What stays between steps, of the model alone: parameters, buffers, optimizer state, gradients that are
        accumulated, averages; and the criterion's tensors."""
        stepping = self.stepping.gradient_bytes(self.model) + self.stepping.average_bytes(self.model)
        existing = bytes_of([*tensors_of(self.model), *self.criterion.tensors])
        return existing + self.optimizer_bytes(self.model)[0] + stepping + self._scale_bytes


def _meta_copies(model, backbone):
    """A model and its backbone on the meta device; they share their modules as the given ones do."""
    copied, *units, classifier = meta_copy(
        nn.ModuleList([model, *(unit.module for unit in backbone.units), backbone.classifier])
    )
    units = tuple(replace(unit, module=module) for unit, module in zip(backbone.units, units, strict=True))
    return copied, replace(backbone, units=units, classifier=classifier)


def train_mode(model):
    """Puts a model that is in eval mode as a whole into training mode; returns whether it was. Where parts are in
    training mode, somebody chose which."""
    wholly_eval = not any(module.training for module in model.modules())
    if wholly_eval:
        model.train()
    return wholly_eval


def _bp_macs(lines):
    """Multiply-accumulates of backpropagation: those of the first unit, which gives the images no gradient there
    either; of every other unit forward and twice backward; and the classifier's."""
    units = [m for line in lines for m in line.moments if m.part not in ("head", "extra") and not m.rebuilds]
    first = sum(moment.macs for moment in units if moment.part == units[0].part)
    others = [m.macs for m in units if m.part != units[0].part and m.phase is Phase.FORWARD]
    classifier = [moment.macs for moment in lines[-1].moments if moment.part == "head"]
    return first + 3 * sum(others) + sum(classifier)


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _frozen(module):
    """How many of a module's parameters are frozen."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
