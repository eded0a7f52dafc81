"""SyncNorm: BatchNorm in training mode by the statistics of all ranks' images together, as nn.SyncBatchNorm has it."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...distributed.collectives import STATISTICS, own_group
from ...distributed.faults import answering
from ...distributed.group import world
from ..tensors import like
from .island import Island
from .norm import (
    Norm,
    ResidualSample,
    affine,
    chain_at,
    fused,
    is_plain_norm,
    rebuilt,
    statistics,
    update_running_statistics,
)

__all__ = ["SyncNorm", "check_all_are_synchronised", "combined"]

_ops = torch.ops.auglocal_ext


@dataclass(frozen=True)
class SyncNorm(Norm):
    """As Norm, of a batch whose images lie on the ranks of a process group, not necessarily as many on each.

    In the forward pass each rank's statistics are sent to all, in the backward pass its two sums a channel are added to
    the others'. The group is the module's own, where an nn.SyncBatchNorm has one, or that of the ranks that train the
    same module, `distributed.group.world`. Alone nothing is sent, and the result is Norm's to rounding. The gradients
    of weight and bias are of this rank's images, as torch has them: they are averaged with all others'. Of matrices (N,
    C) and (N, C, L) too.
    """

    @classmethod
    def match(cls, at):
        kinds = (nn.SyncBatchNorm, *((nn.BatchNorm2d, nn.BatchNorm1d) if at.sync_batch_norm else ()))
        return chain_at(cls, at) if any(is_plain_norm(at.module(), kind) for kind in kinds) else None

    @property
    def of_batch(self):
        return [*statistics(self), f"{self.out}.count"]

    @property
    def gradients(self):
        return partial(_gradients, self.bn)

    def forward(self, emit):
        emit.step(self, "statistics", partial(_statistics, self.bn), [self.source], self.of_batch)
        run = partial(_apply, self.bn, *fused(self.function))
        reads = [self.source, *statistics(self), *self.sources[1:]]
        emit.step(self, "norm", partial(run, ()), reads, [self.out])
        emit.derive(self, "rebuild", run, reads, [self.out], like=self.source)

    @classmethod
    def samples(cls):
        norm, acts = nn.SyncBatchNorm, (nn.ReLU(inplace=True), nn.SiLU(), nn.GELU("tanh"))
        return (
            norm(4),
            nn.Sequential(nn.Conv2d(4, 4, 1), norm(4, momentum=None), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Sequential(norm(4, eps=0.1), act, norm(4)) for act in acts),
            nn.Sequential(nn.Flatten(2), norm(4), nn.LeakyReLU(0.2), nn.Unflatten(2, (7, 6))),
            ResidualSample(norm(4), nn.ReLU()),
            nn.Sequential(ResidualSample(norm(4), nn.Identity()), nn.Conv2d(4, 4, 1)),
        )


def check_all_are_synchronised(nodes):
    """ValueError where an island has a BatchNorm in training mode that would go by its own device's images alone."""
    for node in nodes:
        inside = node.call.named_modules() if isinstance(node, Island) and isinstance(node.call, nn.Module) else ()
        for path, module in inside:
            if isinstance(module, _BatchNorm) and module.training and not isinstance(module, nn.SyncBatchNorm):
                raise ValueError(
                    f"sync_batch_norm=True cannot synchronise {path or 'the layer'} of {node.what}, {module}: it takes "
                    f"a BatchNorm1d or 2d with affine=True and track_running_stats=True in a forward that can be "
                    f"traced; change the layer, or leave sync_batch_norm out"
                )


# ---- what is sent ----------------------------------------------------------------------------------------------------


def _group(bn):
    own = getattr(bn, "process_group", None)
    return own_group(STATISTICS) if own is None else own


def _ranks(bn):
    own = getattr(bn, "process_group", None)
    return world().size if own is None else distributed.get_world_size(own)


def _gathered(row, bn):
    """(ranks, n): each rank's row (n,). Of a row without data nothing is sent."""
    ranks = _ranks(bn)
    if ranks == 1:
        return row.unsqueeze(0)
    rows = row.new_empty(ranks, len(row))
    if not row.is_meta:
        # Newer releases of torch warn of the older name.
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        with answering("the statistics of a BatchNorm"):
            gather(rows.view(-1), row, group=_group(bn))
    return rows


def _summed(values, bn):
    """The sum of all ranks' values, in place. Of values without data nothing is sent."""
    if _ranks(bn) > 1 and not values.is_meta:
        with answering("the gradients of a BatchNorm"):
            distributed.all_reduce(values, group=_group(bn))
    return values


def combined(rows):
    """The statistics of all ranks' values together, as in Chan et al. 1979.

    rows: (ranks, 2 C + 1), float64: of each rank the means, the sums of squared deviations, and how many values of a
        channel those are of, which may be none.

    Returns:
        (mean, var, count): mean and biased variance, (C,), and the number of values, (), all float64.
    """
    channels = rows.shape[1] // 2
    means, squares, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0) / count, count


# ---- steps -----------------------------------------------------------------------------------------------------------


def _maps(x):
    """x as the kernels take it: (N, C) and (N, C, L) as maps."""
    return x[(..., *[None] * (4 - x.dim()))]


def _shaped(maps, x):
    """Maps in the shape of the x that they were made of."""
    return maps[(..., *[0] * (4 - x.dim()))]


def _statistics(bn, x):
    own, count = _ops.batch_norm_statistics(_maps(x)), x.numel() // x.shape[1]
    mean, var = own[0].double(), own[1].double()
    rows = _gathered(torch.cat([mean, var * count, mean.new_full((1,), count)]), bn)
    mean, var, count = combined(rows)
    update_running_statistics(bn, mean, var, count)
    return mean.to(own[0].dtype), var.to(own[1].dtype), count


def _apply(bn, act, slope, over, x, mean, var, *residual):
    return _shaped(rebuilt(bn, act, slope, over, _maps(x), mean, var, *map(_maps, residual)), x)


def _gradients(bn, act, slope, grad, x, of_batch, y, dx):
    """As Norm's, with both sums of all ranks between the two passes."""
    mean, var, count, *_ = of_batch
    maps, norm = _maps(x), (*affine(bn), mean, var)
    grad, dx = (like(_maps(given), maps) for given in (grad, dx))
    y, masked = (None, None) if y is None else (like(_maps(y), maps), grad)
    sums, *parameters = _ops.batch_norm_act_backward_sums(grad, maps, *norm, y, bn.eps, act, masked, slope)
    means = _summed(sums, bn).div_(count)
    left = act if masked is None else 0  # behind the mask there is no activation any more
    _ops.batch_norm_act_backward_apply_out(grad, maps, *norm, means, bn.eps, left, dx, slope)
    return _shaped(dx, x), _shaped(grad, x), *parameters
