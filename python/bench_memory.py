"""What a training step costs in memory and arithmetic, beside what a user would do without this project.

    python python/bench_memory.py                              counted on meta tensors: any network, any machine
    python python/bench_memory.py --device cpu|cuda            small cases run: time and measured bytes as well
    [--cases NAME ...] [--json FILE] [--markdown FILE]

Rows: eager backpropagation (BP), BP with every unit checkpointed (GC), the local step by autograd as the method's
authors do it, and this project's step: BP and GC on the same engine, one module per unit, and under budgets of the
whole step the cheapest cuts, with the paper's nets, with light ones, and with light ones whose depth is chosen border
by border and convolutions that run again unit by unit. goal: the most arithmetic that was aimed at for that budget.
Activations: the highest of everything but parameters, their gradients, optimizer state and the batch; total:
everything. Bytes are of live tensors, without a library's scratch. Measured steps run in turn, one step of each at a
time, on a GPU one method after another; those of torch.compile have activation budgets, and of them `saved` is what the
partitioner keeps for the backward. Files are written anew after each case, on a GPU after each method.
"""

import gc
import re
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import auglocal_ext
from auglocal_ext.backbone import as_backbone
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, number, whole
from auglocal_ext.common.device import usable_device
from auglocal_ext.common.files import check_writable, write_json, write_text
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.common.messages import first_line

sys.path.insert(0, str(Path(__file__).parent))
from records import machine

LAYOUT = torch.contiguous_format  # of the images, where nothing runs


@dataclass(frozen=True)
class Case:
    """A network, its batch, the depth of the paper's aux nets, and goals: (GB of the whole step, MACs / BP at most)."""

    network: str
    shape: tuple[int, int, int, int]
    classes: int
    depth: int
    goals: tuple[tuple[float, float], ...] = ()

    @property
    def name(self):
        return f"{self.network}, {self.shape[2]}x{self.shape[3]}, batch {self.shape[0]}, d={self.depth}"


CASES = {
    "meta": {
        "resnet32": Case("resnet32", (1024, 3, 32, 32), 10, 4, ((0.56, 1.03), (0.42, 1.06))),
        "resnet110": Case("resnet110", (1024, 3, 32, 32), 10, 4, ((0.84, 1.06), (0.58, 1.12))),
        "resnet34": Case("resnet34", (256, 3, 224, 224), 1000, 5, ((2.05, 1.03), (1.85, 1.06), (1.6, 1.15))),
        "resnet50": Case("resnet50", (256, 3, 224, 224), 1000, 5, ((5.6, 1.02), (5.0, 1.08))),
        "resnet101": Case("resnet101", (256, 3, 224, 224), 1000, 5, ((8.8, 1.01), (8.2, 1.04), (7.0, 1.12))),
        "vgg13_bn": Case("vgg13_bn", (256, 3, 224, 224), 1000, 5, ((11.6, 1.03), (10.0, 1.1))),
    },
    "cpu": {
        "resnet32": Case("resnet32", (128, 3, 32, 32), 10, 4),
        "resnet18": Case("resnet18", (8, 3, 224, 224), 1000, 4),
    },
    "cuda": {
        "resnet32": Case("resnet32", (1024, 3, 32, 32), 10, 4),
        "resnet110": Case("resnet110", (1024, 3, 32, 32), 10, 4),
        "resnet34": Case("resnet34", (256, 3, 224, 224), 1000, 5),
        "resnet101": Case("resnet101", (256, 3, 224, 224), 1000, 5),
    },
}


@dataclass(frozen=True)
class Row:
    case: str
    method: str
    activations: int | None  # bytes
    total: int | None
    macs: float | None  # multiply-accumulates / BP
    milliseconds: float | None = None  # median of a step
    allocated: int | None = None  # torch.cuda.max_memory_allocated
    reserved: int | None = None
    goal: float | None = None  # the most MACs / BP that were aimed at
    saved: int | None = None  # bytes that torch.compile keeps for the backward
    error: str | None = None  # why there is no figure


# ---- steps in plain torch -------------------------------------------------------------------------------------


class Eager:
    """BP by autograd; checkpointed: with each unit behind the stem re-run in the backward, its BatchNorms updated twice
    as torch.utils.checkpoint leaves them."""

    def __init__(self, model, checkpointed=False, run=None):
        self.model, self.backbone, self.checkpointed = model, as_backbone(model), checkpointed
        self.run = model if run is None else run  # what is compiled has no length to ask for
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def tensors(self):
        state = [value for values in self.optimizer.state.values() for value in values.values() if value is not None]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def forward_backward(self, images, labels):
        if not self.checkpointed:
            logits = self.run(images)
        else:
            x = images
            for index, unit in enumerate(self.backbone.units):
                x = checkpoint(unit.module, x, use_reentrant=False) if index else unit.module(x)
            logits = self.backbone.classifier(x)
            del x
        F.cross_entropy(logits, labels).backward()

    def step(self, images, labels):
        self.forward_backward(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class EagerLocal:
    """The local step by autograd: each module's backward at once, then its optimizer, as the authors' code can at
    best be run."""

    def __init__(self, trainer):
        self.trainer = trainer

    def tensors(self):
        return list(self.trainer.tensors())

    def step(self, images, labels):
        x = images
        for module, optimizer in zip(self.trainer.local_modules, self.trainer.optimizers, strict=True):
            x, logits = module(x)
            F.cross_entropy(logits, labels).backward()
            x = x.detach()
            del logits
            if x.device.type != "meta":  # where fused optimizers are not
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


# ---- counted on meta tensors ------------------------------------------------------------------------------------


def counted(case):
    """Rows of a case, without running it."""
    with torch.device("meta"):
        model = auglocal_ext.models.create(case.network, case.classes)
        images, labels = torch.empty(case.shape), torch.empty(case.shape[0], dtype=torch.int64)
    one, bp = one_of(model, case), one_of(model, case, rule="bp")
    batch = images.nbytes + labels.nbytes
    state = bp.state_bytes + batch
    for method, checkpointed, macs in (("eager BP", False, 1.0), ("GC, every unit", True, 4 / 3)):
        step = Eager(model, checkpointed)
        peak = live_peak(lambda: step.forward_backward(images, labels), [*step.tensors(), images, labels])  # noqa: B023
        gradients = bp.modules[0].gradient_bytes if checkpointed else 0
        # At eager BP's peak, the end of its forward, no gradient is there yet; at GC's most are.
        yield Row(
            case.name,
            method,
            peak - step_bytes(step) - batch - gradients,
            peak + state - step_bytes(step) - batch,
            macs,
        )
        model.zero_grad(set_to_none=True)
    trainer = auglocal_ext.LocalTrainer(model, case.depth)
    step = EagerLocal(trainer)
    peak = live_peak(lambda: step.step(images, labels), [*step.tensors(), images, labels])
    rest = step_bytes(step) + batch
    yield Row(
        case.name, "local step by autograd", peak - rest, peak - rest + one.state_bytes + batch, one.macs / one.bp_macs
    )
    yield planned(case, "one module per unit", one)
    yield planned(case, "BP on this engine", bp)
    yield planned(case, "every unit checkpointed, on this engine", one_of(model, case, rule="checkpoint"))
    for budget, goal in case.goals:
        for nets, options in NETS.items():
            method = f"budget {budget:g} GB, {nets}"
            try:
                found = one_of(model, case, memory_budget=round(budget * 1e9), **options)
            except ValueError as error:
                least = re.search(r"needs ([\d.]+ [MG]B)", str(error))
                yield Row(case.name, method, None, None, None, goal=goal, error=f"the least is {least[1]}")
                continue
            again = sum(len(module.recomputed) for module in found.modules)
            cut = f"K = {len(found.modules)}" + (f", {again} units run again" if again else "")
            yield replace(planned(case, f"{method} ({cut})", found), goal=goal)


# Under a budget. The depth of light ones is the default one; chosen, it is what costs the least.
NETS = {
    "the paper's nets": {},
    "light nets": {"depth": 4, "auxiliary": "light"},
    "light nets, all chosen": {"depth": "auto", "auxiliary": "light", "recompute": "auto"},
}


def one_of(model, case, **options):
    return auglocal_ext.plan(model, case.shape, **({"depth": case.depth, "memory_format": LAYOUT} | options))


def live_peak(run, existing):
    with LiveBytes(existing) as live:
        run()
    return live.peak


def step_bytes(step):
    return sum(tensor.nbytes for tensor in step.tensors())


def planned(case, method, plan):
    return Row(case.name, method, plan.activation_bytes, plan.peak_bytes, plan.macs / plan.bp_macs)


# ---- run ----------------------------------------------------------------------------------------------------------


def measured(case, device, precision, seconds):
    """Rows of a case that was run. On the CPU one step of each in turn, so that what disturbs the machine disturbs all
    alike; on a GPU one after another, so that each has the memory for itself."""
    images = torch.randn(case.shape).to(device, memory_format=torch.channels_last)
    labels = torch.arange(case.shape[0], device=device) % case.classes
    autocast = torch.autocast(device, torch.bfloat16, precision == "bf16")
    rows, steps = {}, {}
    for method, make in methods(case, device, precision).items():
        gc.collect()  # the method's before: a step's program refers to itself
        try:
            step = make()
            run = partial(_run, step, images, labels, autocast)
            rows[method] = _memory(case, method, step, run, images, labels, device)
        except Exception as error:  # torch.compile may not run here: the row says so
            rows[method] = Row(case.name, method, None, None, None, error=first_line(error))
            step = run = None
        else:
            steps[method] = run
        print(f"{case.name}: {method}", file=sys.stderr, flush=True)
        if device == "cuda":
            times = _times(steps, device, seconds)
            yield _timed(rows.pop(method), times)
            step = run = None
            steps.clear()
    times = _times(steps, device, seconds * len(steps))
    yield from (_timed(row, times) for row in rows.values())


def _timed(row, times):
    return replace(row, milliseconds=statistics.median(times[row.method])) if row.method in times else row


def methods(case, device, precision):
    """name -> what makes a step of it, an object with `step(images, labels)` and `tensors()`."""

    def fresh():
        torch.manual_seed(0)
        model = auglocal_ext.models.create(case.network, case.classes)
        return model.to(device, memory_format=torch.channels_last)

    def local(**options):
        return auglocal_ext.LocalTrainer(fresh(), case.depth, precision=precision, **options)

    def compiled(budget):
        model = fresh()
        return Eager(model, run=torch.compile(model, backend=partial(_compiled_within, budget)))

    def within_checkpoint(**options):
        model = fresh()
        memory = auglocal_ext.plan(model, case.shape, rule="checkpoint", precision=precision).peak_bytes
        plan = auglocal_ext.plan(model, case.shape, precision=precision, memory_budget=memory, **options)
        return auglocal_ext.LocalTrainer(model, plan=plan)

    return {
        "eager BP": lambda: Eager(fresh()),
        "GC, every unit": lambda: Eager(fresh(), checkpointed=True),
        **{f"compiled BP, activation budget {budget:g}": partial(compiled, budget) for budget in (1.0, 0.7, 0.5)},
        "local step by autograd": lambda: EagerLocal(local()),
        "one module per unit": local,
        "BP on this engine": lambda: local(rule="bp"),
        "every unit checkpointed, on this engine": lambda: local(rule="checkpoint"),
        "in its memory, light nets": lambda: within_checkpoint(auxiliary="light"),
        "in its memory, light nets, all chosen": lambda: within_checkpoint(
            depth="auto", auxiliary="light", recompute="auto"
        ),
    }


def _compiled_within(budget, graph, inputs):
    """torch.compile's own backend under an activation budget, whenever it compiles: the setting is of the process, and
    models of several budgets take their steps in turn."""
    with torch._functorch.config.patch(activation_memory_budget=budget):
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def _run(step, images, labels, autocast):
    if isinstance(step, auglocal_ext.LocalTrainer):
        step.step(images, labels)
    else:
        with autocast:
            step.step(images, labels)


def _memory(case, method, step, run, images, labels, device):
    """The Row of a step without its time."""
    for _ in range(2):
        run()
    saved = allocated = reserved = activations = total = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if method.startswith("compiled"):
        saved = _saved_bytes(step, run)
    elif device != "cuda":
        with LiveBytes([*step.tensors(), images, labels]) as live:
            existing = live.now
            run()
        activations, total = live.peak - existing, live.peak
    plan = getattr(step, "plan", None)
    macs = plan.macs / plan.bp_macs if plan else None
    return Row(case.name, method, activations, total, macs, None, allocated, reserved, saved=saved)


def _saved_bytes(step, run):
    """Bytes that autograd keeps between forward and backward, parameters and buffers left out."""
    own = {tensor.untyped_storage()._cdata for tensor in step.tensors()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def _times(steps, device, seconds):
    """method -> milliseconds of its steps, one of each in turn until the seconds are over, three at least."""
    times, until = {method: [] for method in steps}, time.perf_counter() + seconds
    while steps and (time.perf_counter() < until or len(next(iter(times.values()))) < 3):
        for method, run in steps.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[method].append(1e3 * (time.perf_counter() - started))
    return times


# ---- tables ---------------------------------------------------------------------------------------------------


def markdown(rows, about):
    """The rows as Markdown; columns without a figure are left out."""
    gb = lambda value: "" if value is None else f"{value / 1e9:.3f}"  # noqa: E731
    columns = {
        "case": lambda row: row.case,
        "method": lambda row: row.method if row.error is None else f"{row.method}: {row.error}",
        "activations, GB": lambda row: gb(row.activations),
        "total, GB": lambda row: gb(row.total),
        "MACs / BP": lambda row: "" if row.macs is None else f"{row.macs:.3f}",
        "goal": lambda row: "" if row.goal is None else f"{row.goal:.2f}",
        "saved, GB": lambda row: gb(row.saved),
        "ms a step": lambda row: "" if row.milliseconds is None else f"{row.milliseconds:.1f}",
        "allocated, GB": lambda row: gb(row.allocated),
        "reserved, GB": lambda row: gb(row.reserved),
    }
    columns = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parse(arguments=None):
    """The options of `bench`."""
    parser = Parser("bench_memory", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CASES, default="meta")
    parser.add_argument("--cases", nargs="+", help="only these (default: all of the device's)")
    parser.add_argument("--batch-size", type=whole(2), help="images in a step (default: each case's own)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of measured steps")
    parser.add_argument("--seconds", type=number(0), default=10, help="measuring time per method")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    cases = CASES[options.device]
    unknown = set(options.cases or ()) - set(cases)
    if unknown:
        parser.error(f"--cases must be of {', '.join(cases)} on {options.device}, given {', '.join(sorted(unknown))}")
    return options


def bench(options):
    """Counts or measures as told; returns the exit status."""
    cases = CASES[options.device]
    if options.device != "meta":
        usable_device(options.device)
    for path, option in ((options.json, "--json"), (options.markdown, "--markdown")):
        if path:
            check_writable(path, option)
    about = {"counted on": "meta tensors", "torch": torch.__version__, "precision": options.precision}
    if options.device != "meta":
        about = {"precision": options.precision, **machine(options.device)}
    rows = []
    for name in options.cases or cases:
        case = cases[name]
        if options.batch_size:
            case = replace(case, shape=(options.batch_size, *case.shape[1:]))
        made = (
            counted(case)
            if options.device == "meta"
            else measured(case, options.device, options.precision, options.seconds)
        )
        for row in made:
            rows.append(row)
            print(f"{row.case}: {row.method}", file=sys.stderr, flush=True)
            _write(options, rows, about)
    print(markdown(rows, about))
    return 0


def _write(options, rows, about):
    if options.markdown:
        write_text(options.markdown, markdown(rows, about))
    if options.json:
        write_json(options.json, {**about, "rows": [asdict(row) for row in rows]})


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("bench_memory", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
