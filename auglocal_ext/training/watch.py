"""Whether what a trainer was made for is still there: its modules, its parameters, their modes.

A step looks at identities and flags only, at no tensor's values.
"""

from torch import nn
from torch.nn.modules import module as torch_hooks

from ..common.meta import HOOKS, METHODS
from ..planning.planner import train_mode

__all__ = ["Watch"]


# Settings that a node was chosen by; what else a layer has, its step reads each time.
_ANY = ("inplace", "p", "mode")  # the last two of dropout and stochastic depth

_SETTINGS = {
    nn.Conv2d: ("padding_mode", "padding"),
    nn.MaxPool2d: ("kernel_size", "stride", "dilation", "return_indices"),
    nn.AvgPool2d: ("stride",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.BatchNorm2d: ("affine",),
    nn.SyncBatchNorm: ("affine",),
}

_FOLLOWED = ("training", *_ANY)

_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def _read_once(module):
    """The names of a block's plain attributes: its forward may have read them when it was cut, and is not run again."""
    if not module._modules or type(module).__module__.startswith("torch.nn."):
        return []
    return [n for n, value in vars(module).items() if isinstance(value, int | float | str) and n not in _FOLLOWED]


class Watch:
    """Remembers modules as they are.

    Args:
        roots: name -> nn.Module; the names are how errors call them. "": the model.
    """

    def __init__(self, roots):
        self._model, paths = roots[""], {}  # of each module, the first one
        for name, root in roots.items():
            for path, module in root.named_modules(prefix=name):
                paths.setdefault(module, path)
        self._modules = [(path, module, vars(module)) for module, path in paths.items()]
        self._parameters = list({id(p): p for _, module, _ in self._modules for p in module._parameters.values()
                                 if p is not None}.values())  # fmt: skip
        self._chosen_by = [
            (state, [name for name in _SETTINGS.get(type(module), _ANY) if name in state] + _read_once(module))
            for _, module, state in self._modules
        ]
        self._chosen_by = [(state, names) for state, names in self._chosen_by if names]
        self._kinds = sorted({type(module) for _, module, _ in self._modules}, key=str)
        self._parts_of_each = [self._parts_of([one]) for one in self._modules]
        self._parts, self._places = self._parts_of(self._modules), self._current_places()

    def check(self):
        """Raises ValueError where a module or a parameter was replaced, added or removed, or has another dtype, device,
        shape or memory format; says which."""
        if self._parts_of(self._modules) != self._parts:
            raise ValueError(self._say_what_was_replaced())
        places = self._current_places()
        if places != self._places:
            at = next(i for i, (now, then) in enumerate(zip(places, self._places, strict=True)) if now != then)
            now, then = (
                f"{dtype} on {device} of shape {tuple(shape)} and strides {strides}"
                for dtype, device, shape, strides in (places[at], self._places[at])
            )
            raise ValueError(
                f"parameter {self._name(self._parameters[at])} is {now}, it was {then} when the trainer was made: put "
                f"it back, or make a new trainer of the model"
            )

    def modes(self):
        """What may change between steps, and is followed: which modules train, which parameters are frozen, which
        statistics a normalisation keeps, settings that decide what runs a layer, methods put on an object or a class.
        Comparable."""
        found = []
        for _, _, state in self._modules:
            found.append(state["training"])
            if state["_buffers"]:
                found.append(tuple([buffer is None for buffer in state["_buffers"].values()]))
                found.append(state.get("track_running_stats"))
            if not METHODS.isdisjoint(state):
                found.append([state.get(method) for method in METHODS])
        found.extend([state[name] for state, names in self._chosen_by for name in names])
        found.extend([kind.forward for kind in self._kinds])
        found.extend([parameter.requires_grad for parameter in self._parameters])
        return found

    def modes_in_training(self):
        """The modes that the first step will find, which puts a model in eval mode into training mode."""
        was_in_eval_mode = train_mode(self._model)
        modes = self.modes()
        if was_in_eval_mode:
            self._model.eval()
        return modes

    def hooked(self, run):
        """The path of the first module with a hook that no step runs, or None. run: the modules whose hooks are run."""
        if any([getattr(torch_hooks, hooks) for hooks in _GLOBAL_HOOKS]):
            return "every module of the process"
        for path, module, state in self._modules:
            if any([state[hooks] for hooks in HOOKS]) and module not in run:
                return path or type(module).__name__
        return None

    @staticmethod
    def _parts_of(modules):
        """The identities of each module's children and parameters, by name too: pruning makes another weight of the
        same parameter. Of all modules in one list."""
        found = []
        for _, module, state in modules:
            found.append(module.__class__)
            for kind in ("_modules", "_parameters"):
                if state[kind]:
                    found += state[kind]
                    found += map(id, state[kind].values())
        return found

    def _current_places(self):
        return [(p.dtype, p.device, p.shape, p.stride()) for p in self._parameters]

    def _name(self, parameter):
        for path, module, _ in self._modules:
            for name, own in module._parameters.items():
                if own is parameter:
                    return f"{path}.{name}".removeprefix(".")

    def _say_what_was_replaced(self):
        each = zip(self._modules, self._parts_of_each, strict=True)
        path, module, state = next(one for one, then in each if self._parts_of([one]) != then)
        known = {id(m) for _, m, _ in self._modules} | {id(p) for p in self._parameters} | {id(None)}
        changed = [n for kind in ("_modules", "_parameters") for n, own in state[kind].items() if id(own) not in known]
        what = f"{path}.{changed[0]}".strip(".") if changed else path or type(module).__name__
        kind = "parameter " if changed and isinstance(getattr(module, changed[0]), nn.Parameter) else ""
        return (
            f"{kind}{what} was replaced since the trainer was made, which steps what was there before: make a new "
            f"trainer of the model (load_state_dict without assign=True keeps the parameters there are)"
        )
