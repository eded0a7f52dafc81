"""The emulated CUDA kernels: orders of threads, devices, and sizes that the ops' own tests leave out; and the machine
that runs them: what it stops."""

import contextlib
import ctypes
import re

import emulation
import pytest
import torch
from ops_helpers import LAYOUTS, make

from auglocal_ext import ops
from auglocal_ext.ops.batch_norm_act import ACTIVATIONS

OPS = torch.ops.auglocal_ext


def shifted(t):
    """The same values in the same layout, from the second element of an allocation on."""
    return torch.empty(t.numel() + 1, dtype=t.dtype).as_strided(t.shape, t.stride(), 1).copy_(t)


def everything(shape, dtype, layout, window=(3, 3, 2, 2, 1, 1), place=torch.clone):
    """What every kernel makes of one input, by name. place: makes a copy of it somewhere."""
    x, weight, bias, added, grad = make(shape, dtype, layout, True)
    x, added, grad = place(x), place(added), place(grad)
    mean, var = ops.batch_norm_statistics(x)
    values = {"mean": mean, "var": var}
    kinds = ("plain", None, False), ("relu", None, True), ("added", added, True), ("hardswish", None, "hardswish")
    for kind, residual, act in kinds:
        y, *statistics = ops.batch_norm_act(x, weight, bias, residual, act=act)
        assert torch.equal(statistics[0], mean) and torch.equal(statistics[1], var)
        values[f"{kind} y"] = y
        again = ops.batch_norm_act_apply(x, weight, bias, mean, var, residual, act=act)
        assert torch.equal(y, again)
        mask = y if residual is not None else None
        backward = (weight, bias, mean, var)
        names = [f"{kind} {name}" for name in ("dx", "dresidual", "dweight", "dbias")]
        made = ops.batch_norm_act_backward(grad, x, *backward, mask, act=act)
        values |= {name: t for name, t in zip(names, made, strict=True) if t is not None}
        over = x.clone(), None if mask is None else mask.clone()
        made = ops.batch_norm_act_backward(grad, over[0], *backward, over[1], act=act, dx=over[0], dresidual=over[1])
        assert all(torch.equal(t, values[name]) for name, t in zip(names, made, strict=True) if t is not None)
        code = ACTIVATIONS.index(act) if isinstance(act, str) else int(act)
        masked = None if mask is None else torch.full_like(x, torch.nan)
        sums, *parameters = OPS.batch_norm_act_backward_sums(grad, x, *backward, mask, 1e-5, code, masked)
        left, dx = (grad, code) if masked is None else (masked, 0), torch.full_like(x, torch.nan)
        means = sums / (x.numel() // x.shape[1])
        OPS.batch_norm_act_backward_apply_out(left[0], x, *backward, means, 1e-5, left[1], dx)
        names = [f"{kind} in two passes: {name}" for name in ("sums", "dweight", "dbias", "dx")]
        values |= dict(zip(names, (sums, *parameters, dx), strict=True))
        assert masked is None or torch.equal(masked, values[f"{kind} dresidual"])
        if not isinstance(act, bool):
            continue  # the head has a ReLU or nothing
        values[f"{kind} pooled"] = OPS.batch_norm_act_mean_apply(x, weight, bias, mean, var, residual, 1e-5, act)
        of_maps = grad[:, :, 0, 0].to(weight.dtype).contiguous()
        mask = residual if act else None
        made = OPS.batch_norm_act_mean_backward(of_maps, x, *backward, mask, 1e-5, act, mask is not None)
        names = [f"{kind} of the pool: {name}" for name in ("dx", "dresidual", "dweight", "dbias")]
        values |= {name: t for name, t in zip(names, made, strict=True) if t.numel()}
    sizes = [(shape[2 + i] + 2 * window[4 + i] - window[i]) // window[2 + i] + 1 for i in (0, 1)]
    y, index = OPS.batch_norm_act_max_pool_apply(x, weight, bias, mean, var, 1e-5, *window, *sizes)
    made = OPS.batch_norm_act_max_pool_backward(y, x, index, weight, bias, mean, var, 1e-5, *window)
    return (
        values | {"maxima": y, "taps": index} | dict(zip(("pool dx", "pool dweight", "pool dbias"), made, strict=True))
    )


def assert_close(ours, expected, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        wrong, size = (ours[name].double() - value.double()).norm(), value.double().norm()
        assert wrong <= tolerance * (size + 1), name


SHAPES = [(5, 20, 7, 7), (3, 24, 8, 8), (2, 3, 33, 16), (9, 34, 2, 1), (7, 8, 1, 1), (1, 1, 5, 3), (40, 6, 3, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_threads_and_blocks_changes_no_bit(shape, layout, dtype, emulator):
    """For several seeds, on a device where a tensor takes rounds and on one where blocks team up; near the CPU's."""
    expected = everything(shape, dtype, layout)
    for device in ("a slice of sm_90", "a large slice of sm_90"):
        orders = []
        for seed in range(2):
            with emulator.running(seed, device):
                before = emulator.launches()
                orders.append(everything(shape, dtype, layout))
                assert emulator.launches() > before + 20
        for other in orders[1:]:
            assert all(torch.equal(value, other[name]) for name, value in orders[0].items())
        assert_close(orders[0], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24, 8, 8), (5, 16, 7, 7)])
def test_tensors_may_begin_anywhere(shape, layout, dtype, emulator):
    """Where whole vectors would not be in line, narrower ones are used."""
    expected = everything(shape, dtype, layout)
    with emulator.running(2, "a slice of sm_90"):
        assert_close(everything(shape, dtype, layout, place=shifted), expected, dtype)


@pytest.mark.parametrize(("layout", "device"), [*zip(LAYOUTS, ["sm_80", "sm_90"], strict=True)])
def test_whole_gpus(layout, device, emulator, long):
    """As many blocks to a team as a GPU has room for."""
    shape = (12, 20, 17, 16) if long else (12, 20, 9, 8)
    expected = everything(shape, torch.float32, layout)
    with emulator.running(1, device):
        assert_close(everything(shape, torch.float32, layout), expected, torch.float32)


def test_more_channels_than_a_grid_has_in_its_second_dimension(emulator):
    results = []
    for run in (contextlib.nullcontext(), emulator.running(3, "a large slice of sm_90")):
        with run:
            x, weight, bias, _, grad = make((2, 70_000, 1, 1), torch.float32, LAYOUTS[0], False)
            maps = torch.arange(4 * 70_000 * 5.0, dtype=torch.float64).sin().view(4, 70_000, 5, 1)
            y, mean, var = ops.batch_norm_act(x, weight, bias)
            made = ops.batch_norm_act_backward(grad, x, weight, bias, mean, var)
            as_double = [t.double() for t in (weight, bias, mean, var)]
            # Two lanes a map, and more images than blocks beside one another: a block takes several in turn.
            pooled = OPS.batch_norm_act_mean_apply(maps, *as_double, None, 1e-5, True)
            results.append([y, mean, var, made[0], *made[2:], pooled])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_past_2_to_the_31(layout, emulator):
    """The last block of each kernel that walks over a map of 2.3 billion values, in memory that only it touches."""
    shape, window = (17 * 2048, 256, 16, 16), (3, 3, 2, 2, 1, 1)  # images: a multiple of the blocks that take turns
    with emulator.running(5, "sm_90", last_blocks=1):
        tail, weight, bias, _, _ = make((1, *shape[1:]), torch.bfloat16, layout, False)
        mean, var = bias.clone(), weight.clone()
        x = torch.empty(shape, dtype=torch.bfloat16, memory_format=layout)
        assert x.numel() > 2**31
        x[-1:] = tail
        statistics = (weight, bias, mean, var)
        pooled = OPS.batch_norm_act_mean_apply(x, *statistics, None, 1e-5, True)
        maxima, taps = OPS.batch_norm_act_max_pool_apply(x, *statistics, 1e-5, *window, 8, 8)
        found = pooled[-1, -8:].clone(), maxima[-1, -1, -1, -1].clone(), taps[-1, -1, -1, -1].clone()
        maxima[-1:] = 1
        dx = torch.empty_like(x)
        OPS.batch_norm_act_max_pool_backward_out(maxima, x, taps, *statistics, 1e-5, *window, dx)
        assert dx[-1, -1, -1, -1].isnan()  # written, though by sums that only one block knew
        assert not dx[0].any() and not dx[2**31 // x[0].numel()].any()
        del dx, maxima, taps
        if layout == torch.contiguous_format:  # of channels_last, one block's share takes half a minute
            ops.batch_norm_act_apply(x, *statistics, out=x)
            found = *found, x[-1, -1, -1].clone()
        del x
        emulator.machine.emulation_run_last_blocks(0)
        expected_maxima, expected_taps = OPS.batch_norm_act_max_pool_apply(tail, *statistics, 1e-5, *window, 8, 8)
        expected = OPS.batch_norm_act_mean_apply(tail, *statistics, None, 1e-5, True)[0, -8:]
        expected = expected, expected_maxima[0, -1, -1, -1], expected_taps[0, -1, -1, -1]
        expected = *expected, ops.batch_norm_act_apply(tail, *statistics)[0, -1, -1]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[: len(found)], strict=True))


# ---- the machine --------------------------------------------------------------------------------------------

STOPPED = {
    10: "a race in shared memory with thread .*, which wrote there|a race in shared memory with a thread that reads",
    11: "a race in shared memory with thread .*, which wrote there|a race in shared memory with a thread that reads",
    12: "a race in global memory with thread .*, which wrote there",
    13: "a race in global memory with thread .*, which wrote there|a race in global memory with a thread that reads",
    14: "block .* wrote there, and no fences make that known",
    20: "a read past the end|a read outside of every allocation",
    21: "a write past the end|a write outside of every allocation",
    22: "a read outside of every allocation",
    23: "a read outside of every allocation",
    24: "an access out of line with its width",
    30: "threads of a block wait at different barriers",
    31: "a barrier that not all threads of the block reach",
    32: "lanes of a warp at different shuffles",
    33: "threads that wait for ever",
    34: "threads that wait for ever",
    40: "no fences make that known",
    41: "no fences make that known",
    42: "no fences make that known",
    43: "a plain read may find what the first-level cache held before",
    44: "no fences make that known|a race in global memory",
    50: "a barrier of the grid, in a launch that is not cooperative",
    51: "blocks that wait for one another, but are not resident together: 1000",
    52: "more dynamic shared memory than was asked for: 204800 bytes",
    53: "more than 12288 bytes of static shared memory",
    54: "a grid of 0 blocks",
    55: "blocks of 2048 threads",
    60: "an integer overflow",
    61: "a division by zero",
    62: "a shift by more bits than there are",
}


def fault(emulator, case, seed):
    """What the machine says of a kernel in faults.cu, and what that kernel wrote."""
    with emulator.running(seed, "a slice of sm_80"):
        data, counters, said = torch.empty(130), torch.zeros(2, dtype=torch.int32), ctypes.create_string_buffer(1000)
        pointers = ctypes.c_void_p(data.data_ptr()), len(data), ctypes.c_void_p(counters.data_ptr())
        emulator.machine.emulation_fault(case, *pointers, said, len(said))
    return said.value.decode(), data


@pytest.mark.parametrize("case", STOPPED)
def test_what_the_machine_stops_in_every_order(case, emulator):
    for seed in range(8):
        said, _ = fault(emulator, case, seed)
        assert re.search(STOPPED[case], said), said
        assert said.startswith("emulated on a slice of sm_80: ")


def test_what_it_lets_pass(emulator):
    for seed in range(8):
        said, data = fault(emulator, 0, seed)
        assert not said and data[2:66].tolist() == [(i + 1) % 64 for i in range(64)] and data[:2].isnan().all()
        said, data = fault(emulator, 1, seed)
        assert not said and data[2:].tolist() == [7.0] * 128
        said, data = fault(emulator, 2, seed)
        assert not said and data.isnan().all()  # memory that nothing was written to


def test_memory_is_poisoned_and_given_back(emulator):
    with emulator.running():
        assert torch.empty(1000).isnan().all() and torch.empty(1000, dtype=torch.bfloat16).isnan().all()
        outlives = torch.arange(5.0)
    assert outlives.sum() == 10 and not torch.zeros(10).isnan().any()
    before = emulator.launches()
    x, weight, bias, _, _ = make((2, 3, 4, 4), torch.float32, LAYOUTS[0], False)
    ops.batch_norm_act(x, weight, bias)
    assert emulator.launches() == before  # outside, CPU tensors are the CPU's


def test_it_is_built_once(emulator):
    assert emulation.build() == emulation.build()
