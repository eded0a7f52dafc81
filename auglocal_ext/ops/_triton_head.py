"""The CUDA kernels of linear_cross_entropy, in Triton: linear + softmax cross-entropy with their gradients.

Four launches, none of which stores the gradient of the logits:
  1. logits, and for each row and tile of classes the maximum and the sum of exponentials;
  2. from these each row's maximum, log-sum-exp behind it, and loss, and dpooled = dlogits @ weight;
  3. dweight = dlogits^T @ pooled and dbias, each over a few runs of rows;
  4. the sums over those runs, and the loss.
float32, the loss summed in float64; products are not rounded to TF32. Every sum runs in one order that depends on the
shapes only, and no kernel uses atomics: the same bits on every run. No label is used as an address, so one out of range
does no harm: see `_kept` and row_loss.

Where labels are shares of classes, or classes count unequally, the kernels are given the targets (N, K) in place of the
labels (SOFT), and what `_fallbacks.targets` tells of them.
"""

import torch
import triton
import triton.language as tl

from . import _fallbacks

ROWS, CHANNELS = 32, 32  # a tile of pooled
CLASSES = 32  # at most, a tile of weight
WARPS = 8  # with 4 the kernels run out of registers
LABELS = 1024  # read at a time where all are counted, and values summed at a time
PROGRAMS = 256  # about as many run at a time on a large GPU: step 3 cuts the rows until it has as many


@triton.jit
def _kept(labels, classes, ignore_index):
    """The rows that count: neither ignored nor out of range."""
    return (labels != ignore_index) & (labels >= 0) & (labels < classes)


@triton.jit
def _count(labels, n, k, ignore_index, LABELS: tl.constexpr):
    """How many rows count. Every program reads all labels: 8 bytes a row, from the cache."""
    total = tl.zeros((LABELS,), tl.int32)
    for start in range(0, n, LABELS):
        rows = start + tl.arange(0, LABELS)
        total += _kept(tl.load(labels + rows, rows < n, ignore_index), k, ignore_index).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _gradient_divisor(labels, divisors, n, k, ignore_index, SOFT: tl.constexpr, LABELS: tl.constexpr):
    """By what the gradients of the summed loss are divided."""
    if SOFT:
        divisor = tl.load(divisors + 1)
    else:
        divisor = tl.maximum(_count(labels, n, k, ignore_index, LABELS), 1).to(tl.float32)
    return divisor


@triton.jit
def _labels_of(labels, rows, n, k, ignore_index, SOFT: tl.constexpr):
    """(labels, whether they count) of rows; of targets, which have no number, the rows themselves."""
    label, kept = rows, rows < n
    if not SOFT:
        label = tl.load(labels + rows, rows < n, ignore_index)
        kept = _kept(label, k, ignore_index)
    return label, kept


@triton.jit
def _target(labels, rows, label, classes, in_range, k, label_smoothing, SOFT: tl.constexpr):
    """The smoothed one-hot, or the targets that are given: (rows, classes)."""
    if SOFT:
        target = tl.load(labels + rows[:, None] * k + classes[None, :], in_range, 0.0)
    else:
        target = tl.where(classes[None, :] == label[:, None], 1 - label_smoothing, 0.0) + label_smoothing / k
    return target


@triton.jit
def _dlogits(log_p, target, row_mass, rows, in_range, n, SOFT: tl.constexpr):
    """The gradient of the summed loss: (rows, classes), zero out of range. What is summed up from it is divided by the
    number of rows afterwards: one rounding less, and fewer divisions. row_mass: what each row's target sums up to, one
    where it is made of a label."""
    p = tl.exp(log_p)
    if SOFT:
        p *= tl.load(row_mass + rows, rows < n, 0.0)[:, None]
    return tl.where(in_range, p - target, 0.0)


@triton.jit
def logits_kernel(
    pooled, weight, bias, logits, tile_max, tile_sum, n, k, c,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, tiles of classes. tile_max, tile_sum: (N, tiles of classes)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1).to(tl.int64) * CLASSES + tl.arange(0, CLASSES)
    sums = tl.zeros((ROWS, CLASSES), tl.float32)
    for start in range(0, c, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        inside = channels < c
        x = tl.load(pooled + rows[:, None] * c + channels[None, :], (rows < n)[:, None] & inside[None, :], 0.0)
        w = tl.load(weight + classes[None, :] * c + channels[:, None], (classes < k)[None, :] & inside[:, None], 0.0)
        sums = tl.dot(x, w, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + classes, classes < k, 0.0)[None, :]
    tl.store(logits + rows[:, None] * k + classes[None, :], sums, (rows < n)[:, None] & (classes < k)[None, :])
    sums = tl.where((classes < k)[None, :], sums, -float("inf"))
    highest = tl.max(sums, 1)
    at = rows * tl.num_programs(1) + tl.program_id(1)
    tl.store(tile_max + at, highest, rows < n)
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # of classes that are all masked: their sum is 0, not NaN
    tl.store(tile_sum + at, tl.sum(tl.exp(sums - shift[:, None]), 1), rows < n)


@triton.jit
def dpooled_kernel(
    logits, weight, labels, row_mass, divisors, tile_max, tile_sum, row_max, row_log, row_loss, dpooled, n, k, c,
    ignore_index, label_smoothing, SOFT: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, CHANNELS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, tiles of channels. row_max, row_log (of the sum of exponentials behind it), row_loss: (N,);
    the loss is 0 in rows to ignore, NaN where the label is out of range."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = rows < n
    tiles = tl.cdiv(k, CLASSES)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    for tile in range(tiles):
        highest = tl.maximum(highest, tl.load(tile_max + rows * tiles + tile, inside, 0.0))
    total = tl.zeros((ROWS,), tl.float32)
    for tile in range(tiles):
        part = tl.load(tile_sum + rows * tiles + tile, inside, 1.0)
        total += part * tl.exp(tl.load(tile_max + rows * tiles + tile, inside, 0.0) - highest)
    log_total = tl.log(total)

    divisor = _gradient_divisor(labels, divisors, n, k, ignore_index, SOFT, LABELS)
    label, kept = _labels_of(labels, rows, n, k, ignore_index, SOFT)
    gradient = tl.zeros((ROWS, CHANNELS), tl.float32)
    loss = tl.zeros((ROWS,), tl.float32)
    for start in range(0, k, CLASSES):
        classes = start + tl.arange(0, CLASSES)
        in_range = inside[:, None] & (classes < k)[None, :]
        log_p = tl.load(logits + rows[:, None] * k + classes[None, :], in_range, 0.0)
        log_p = log_p - highest[:, None] - log_total[:, None]  # in this order: their sum would lose digits
        target = _target(labels, rows, label, classes, in_range, k, label_smoothing, SOFT)
        loss -= tl.sum(tl.where(in_range & (target != 0), target * log_p, 0.0), 1)
        dlogits = _dlogits(log_p, target, row_mass, rows, in_range & kept[:, None], n, SOFT)
        w = tl.load(
            weight + classes[:, None] * c + channels[None, :], (classes < k)[:, None] & (channels < c)[None, :], 0.0
        )
        gradient = tl.dot(dlogits, w, gradient, input_precision="ieee")
    gradient /= divisor
    tl.store(dpooled + rows[:, None] * c + channels[None, :], gradient, inside[:, None] & (channels < c)[None, :])
    if tl.program_id(1) == 0:
        tl.store(row_max + rows, highest, inside)
        tl.store(row_log + rows, log_total, inside)
        if not SOFT:
            loss = tl.where(kept, loss, tl.where(label == ignore_index, 0.0, float("nan")))
        tl.store(row_loss + rows, loss, inside)


@triton.jit
def dweight_kernel(
    pooled, logits, labels, row_mass, divisors, row_max, row_log, dweights, dbiases, n, k, c, ignore_index,
    label_smoothing, run,
    SOFT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, CHANNELS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of classes, tiles of channels, runs of `run` rows. dweights: (runs, K, C); dbiases: (runs, K)."""
    classes = tl.program_id(0).to(tl.int64) * CLASSES + tl.arange(0, CLASSES)
    channels = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    divisor = _gradient_divisor(labels, divisors, n, k, ignore_index, SOFT, LABELS)
    sums = tl.zeros((CLASSES, CHANNELS), tl.float32)
    bias_sums = tl.zeros((CLASSES,), tl.float32)
    first = tl.program_id(2).to(tl.int64) * run
    for start in range(0, run, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        inside = rows < n
        label, kept = _labels_of(labels, rows, n, k, ignore_index, SOFT)
        in_range = kept[:, None] & (classes < k)[None, :]
        log_p = tl.load(logits + rows[:, None] * k + classes[None, :], in_range, 0.0)
        log_p -= tl.load(row_max + rows, inside, 0.0)[:, None]
        log_p -= tl.load(row_log + rows, inside, 0.0)[:, None]
        target = _target(labels, rows, label, classes, in_range, k, label_smoothing, SOFT)
        dlogits = _dlogits(log_p, target, row_mass, rows, in_range, n, SOFT)
        x = tl.load(pooled + rows[:, None] * c + channels[None, :], inside[:, None] & (channels < c)[None, :], 0.0)
        sums = tl.dot(tl.trans(dlogits), x, sums, input_precision="ieee")
        bias_sums += tl.sum(dlogits, 0)
    sums /= divisor
    bias_sums /= divisor
    dweights += tl.program_id(2).to(tl.int64) * (k * c)
    of_weight = (classes < k)[:, None] & (channels < c)[None, :]
    tl.store(dweights + classes[:, None] * c + channels[None, :], sums, of_weight)
    if tl.program_id(1) == 0:
        tl.store(dbiases + tl.program_id(2).to(tl.int64) * k + classes, bias_sums, classes < k)


@triton.jit
def sums_kernel(
    dweights, dbiases, row_loss, labels, divisors, dweight, dbias, loss, runs, n, k, c, ignore_index,
    RUNS: tl.constexpr, SOFT: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Grid: with RUNS, where there are several, tiles of dweight and dbias together; else one program. The first one
    takes the mean of the losses."""
    if RUNS:
        at = tl.program_id(0).to(tl.int64) * LABELS + tl.arange(0, LABELS)
        of_weight, of_bias = at < k * c, (at >= k * c) & (at < k * c + k)
        sums = tl.zeros((LABELS,), tl.float32)
        for _ in range(runs):
            sums += tl.load(dweights + at, of_weight, 0.0) + tl.load(dbiases + at - k * c, of_bias, 0.0)
            dweights += k * c
            dbiases += k
        tl.store(dweight + at, sums, of_weight)
        tl.store(dbias + at - k * c, sums, of_bias)
    if tl.program_id(0) == 0:
        losses = tl.zeros((LABELS,), tl.float64)
        for start in range(0, n, LABELS):
            rows = start + tl.arange(0, LABELS)
            losses += tl.load(row_loss + rows, rows < n, 0.0).to(tl.float64)
        if SOFT:
            tl.store(loss, tl.sum(losses, 0) / tl.load(divisors))
        else:
            tl.store(loss, tl.sum(losses, 0) / _count(labels, n, k, ignore_index, LABELS))


def linear_cross_entropy(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight=None):
    """As `_fallbacks.linear_cross_entropy`, for float32 and at least one row and channel."""
    pooled, weight, labels = pooled.contiguous(), weight.contiguous(), labels.contiguous()
    bias = bias if bias is None else bias.contiguous()
    (n, c), k = pooled.shape, weight.shape[0]
    soft = labels.is_floating_point() or class_weight is not None
    row_mass = divisors = None
    if soft:
        labels, divisors = _fallbacks.targets(labels, k, label_smoothing, ignore_index, class_weight, pooled.dtype)
        row_mass = labels.sum(1)
    tile = min(CLASSES, max(16, triton.next_power_of_2(k)))
    rows, classes, channels = triton.cdiv(n, ROWS), triton.cdiv(k, tile), triton.cdiv(c, CHANNELS)
    run = triton.cdiv(rows, max(1, min(rows, PROGRAMS // (classes * channels)))) * ROWS
    runs = triton.cdiv(n, run)

    loss, logits, dpooled = pooled.new_empty(()), pooled.new_empty(n, k), torch.empty_like(pooled)
    dweight, dbias = torch.empty_like(weight), weight.new_empty(k)
    # Of each run; of a single one, as of large weights, that is all.
    dweights, dbiases = (dweight, dbias) if runs == 1 else (weight.new_empty(runs, k, c), weight.new_empty(runs, k))
    tile_max, tile_sum = pooled.new_empty(n, classes), pooled.new_empty(n, classes)
    per_row = row_max, row_log, row_loss = [pooled.new_empty(n) for _ in range(3)]
    kind = {"SOFT": soft, "LABELS": LABELS}
    blocks = {"ROWS": ROWS, "CLASSES": tile, "CHANNELS": CHANNELS, "num_warps": WARPS}
    target = (n, k, c, ignore_index, label_smoothing)
    with torch.cuda.device_of(pooled):
        logits_kernel[rows, classes](
            pooled, weight, bias, logits, tile_max, tile_sum, n, k, c, HAS_BIAS=bias is not None, **blocks
        )
        dpooled_kernel[rows, channels](
            logits, weight, labels, row_mass, divisors, tile_max, tile_sum, *per_row, dpooled, *target, **kind, **blocks
        )
        dweight_kernel[classes, channels, runs](
            pooled, logits, labels, row_mass, divisors, row_max, row_log, dweights, dbiases, *target, run,
            **kind, **blocks,
        )  # fmt: skip
        sums_kernel[(1 if runs == 1 else triton.cdiv(k * c + k, LABELS),)](
            dweights, dbiases, row_loss, labels, divisors, dweight, dbias, loss, runs, n, k, c, ignore_index,
            RUNS=runs > 1, **kind,
        )  # fmt: skip
    return loss, logits, dpooled, dweight, dbias
