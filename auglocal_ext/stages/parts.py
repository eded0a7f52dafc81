"""Which tensors of a model a rank has, and which it tells of, where the local modules are spread over ranks.

It is found by the very tensor, not by its name: a ViT's class token belongs to the model, and a unit's module uses it.
"""

import torch
from torch import nn

from ..common.memory import tensors_of

__all__ = ["Parts"]


class Parts:
    """A tensor is that of the first stage whose local modules have it, one that none has is the first stage's.

    Args:
        model, aux_nets: the whole model, and the nets behind its borders.
        local_modules: all of them. spans: of every stage, the range of its own; stage: of which this is.

    Attributes:
        owned: name -> parameter or buffer, of this stage's, also of buffers that a state_dict leaves out.
        saved: those of them that a state_dict has. held: what of a state_dict is here, the first stages' too: a buffer
            may be used by modules of several.
    """

    def __init__(self, model, aux_nets, local_modules, spans, stage):
        first: dict[torch.Tensor, int] = {}
        for number, span in enumerate(spans):
            for module in local_modules[span.start : span.stop]:
                for tensor in tensors_of(module):
                    first.setdefault(tensor, number)
        own = local_modules[spans[stage].start : spans[stage].stop]
        used = {tensor for module in own for tensor in tensors_of(module)}
        roots = nn.ModuleDict({"model": model, "aux_nets": aux_nets})
        state = {n: t for n, t in roots.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
        kept = set(state.values())
        named = state | {n: t for n, t in roots.named_buffers(remove_duplicate=False) if t not in kept}
        self.owned = {name: tensor for name, tensor in named.items() if first.get(tensor, 0) == stage}
        self.saved = {name: tensor for name, tensor in self.owned.items() if name in state}
        self.held = {name: tensor for name, tensor in state.items() if tensor in used or name in self.owned}
        self._model = model
        # Modules of other stages are made of pieces of the graph, which have some of the model's tensors themselves.
        self._gone = self._let_go(named, used | set(self.owned.values()), [roots, *local_modules])

    def _let_go(self, named, here, modules):
        """Puts what is not `here` on the meta device; returns the stand-ins, each with its first name."""
        there = {tensor for module in modules for tensor in tensors_of(module)} - here
        without_data = {tensor: _like(tensor, tensor.detach().to("meta")) for tensor in there}
        for module in modules:
            _replace(module, without_data)
        return {without_data[tensor]: name for name, tensor in reversed(named.items()) if tensor in without_data}

    def put_back(self, values, device):
        """Makes the model whole: what was let go of it is what `values` have under its name."""
        there = {t: name for t, name in self._gone.items() if name.startswith("model.")}
        _replace(self._model, {t: _like(t, values[name].to(device)) for t, name in there.items()})


def _like(tensor, value):
    """A value in a tensor's place: a parameter of one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _replace(root, others):
    """Puts other tensors in the places of those that a module and the modules in it have."""
    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor in others:
                    table[name] = others[tensor]
