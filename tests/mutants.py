"""Breaks the CUDA kernels one by one and runs the emulated tests on each: every mutant has to make one fail.

    python tests/mutants.py [--only NAME ...] [--out benchmarks/results/mutants.md]

A mutant is a text in a source file and what takes its place. The tests are those of tests/ops/test_emulation.py and, for
what these let live, all that are marked as emulated. The table says what killed each. It takes about 40 minutes.
"""

# ruff: noqa: E501

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emulation

TEAMS, ACT, POOL, MEAN, COMMON = (
    f"cuda/{name}"
    for name in (
        "teams.cuh",
        "batch_norm_act.cu",
        "batch_norm_act_max_pool.cu",
        "batch_norm_act_mean.cu",
        "batch_norm.cuh",
    )
)
ACTIVATION = "activation.h"
# name: (file, text, what takes its place)
MUTANTS = {
    # sums over a block
    "block_sum: no barrier between writing and reading the warps' sums": (
        TEAMS, "of_warps[warp * of_a_warp + lane * kSums + i] = sums[i];\n  __syncthreads();",
        "of_warps[warp * of_a_warp + lane * kSums + i] = sums[i];",
    ),
    "block_sum: a shuffle with the wrong lane": (
        TEAMS, "for (int apart = kWarp / 2; apart >= period; apart /= 2)\n#pragma unroll",
        "for (int apart = kWarp / 4; apart >= period; apart /= 2)\n#pragma unroll",
    ),
    "block_sum: a warp too few": (TEAMS, "i < kWarps * of_a_warp; i += channels", "i < (kWarps - 1) * of_a_warp; i += channels"),
    "joined_sum: no barrier before the warps read": (
        TEAMS, "  next[thread] = second;\n  __syncthreads();", "  next[thread] = second;",
    ),
    "joined_sum: no barrier before the totals are read": (
        TEAMS, "    if (lane == 0) totals[channel] = total;\n  }\n  __syncthreads();",
        "    if (lane == 0) totals[channel] = total;\n  }",
    ),
    "joined_sum: a vector that straddles is one channel's": (
        TEAMS, "right == 0 && column * V < begin ? next[at] : here[at]", "here[at]",
    ),
    "joined_sum: a shuffle stops early": (
        TEAMS, "for (int apart = kWarp / 2; apart >= 1; apart /= 2)\n      add(total",
        "for (int apart = kWarp / 2; apart >= 2; apart /= 2)\n      add(total",
    ),
    # teams
    "team: counters are not cleared": (TEAMS, "i += kThreads) arrivals[i] = 0;", "i += kThreads) arrivals[i] += 0;"),
    "team: no barrier of the grid behind the clearing": (
        TEAMS, "if (!all_cleared_) cooperative_groups::this_grid().barrier_wait(std::move(cleared_));", "",
    ),
    "team: arrives before the block's partial sums are written": (
        TEAMS, "    all_cleared_ = true;\n    __syncthreads();", "    all_cleared_ = true;",
    ),
    "team: no fence before arriving": (
        TEAMS, "      __threadfence();\n      last = atomicAdd", "      last = atomicAdd",
    ),
    "team: no fence behind the wait": (
        TEAMS, "__nanosleep(20);\n      __threadfence();", "__nanosleep(20);",
    ),
    "team: one block too few is waited for": (TEAMS, "&arrivals_[group]) < parts)", "&arrivals_[group]) + 1 < parts)"),
    "team: partial sums are read through the first-level cache": (TEAMS, "__ldcg(&of_group[i])", "of_group[i]"),
    "team: groups share their partial sums": (
        TEAMS, "partial_ + group * plan_.parts * channels", "partial_ + group % 1 * plan_.parts * channels",
    ),
    "team: one part too few is summed": (TEAMS, "i < plan_.parts * channels; i += kThreads", "i < (plan_.parts - 1) * channels; i += kThreads"),
    "team: the block that is last of all to arrive does not know": (TEAMS, "+ 1 == parts;", "== parts;"),
    "team: launched without being resident together": (
        TEAMS, "together.val.cooperative = plan.parts > 1;", "together.val.cooperative = 0;",
    ),
    "team: more blocks than are resident": (
        TEAMS, "found.blocks = std::max(blocks, 1) *", "found.blocks = 2 * std::max(blocks, 1) *",
    ),
    # the walk over a share
    "share: off by one": (TEAMS, "plan.share = ceil_div(ceil_div(vectors, parts), unit) * unit;", "plan.share = vectors / parts / unit * unit;"),
    "share: not cut at the group's end": (
        TEAMS, "min((part + 1) * plan.share, plan.rows * plan.columns)", "(part + 1) * plan.share",
    ),
    "share: no mask of the channels past the last": (
        TEAMS, "inside = channel + in_group < plan.channels;", "inside = true;",
    ),
    "share: a row's end is passed": (TEAMS, "if (column >= plan.columns) {", "if (column > plan.columns) {"),
    "share: the joined threads that do not keep to a column walk too": (
        TEAMS, "inside = threadIdx.x < plan.threads;", "inside = true;",
    ),
    "walk: no tail mask": (TEAMS, "if (done + i >= share.vectors) continue;", ""),
    "walk: two threads keep in one slot": (TEAMS, "[index * kThreads + threadIdx.x]", "[index * kThreads + threadIdx.x / 2]", ),
    "walk: too much is kept": (
        TEAMS, "config.dynamicSmemBytes = size_t(plan.kept) *", "config.dynamicSmemBytes = size_t(plan.kept / 2) *",
    ),
    # batch_norm_act
    "forward: a wrong pivot": (ACT, "if (index == 0) pivot = x;", "if (index == 1) pivot = x;"),
    "forward: sums about another thread's pivot": (
        ACT, "const double n = share.vectors, d = double(get<A>(pivot, i)) - double(origins",
        "const double n = share.vectors, d = double(get<A>(pivot, 0)) - double(origins",
    ),
    "forward: no barrier behind the origins": (
        ACT, "if (owner) origins[threadIdx.x] = origin;\n    __syncthreads();", "if (owner) origins[threadIdx.x] = origin;",
    ),
    "forward: no barrier before the constants are used": (
        ACT, "    __syncthreads();\n\n    if (args.y)\n      apply_share", "\n    if (args.y)\n      apply_share",
    ),
    "forward: every block writes the statistics, before they are known": (ACT, "if (team.writes) {\n        args.mean", "if (true) {\n        args.mean"),
    "apply: constants overwritten while they are read": (ACT, "    __syncthreads();  // the last group's constants have been read\n", ""),
    "apply: no barrier behind the constants": (
        ACT, "args.norm().affine(channel);\n    __syncthreads();\n    apply_share", "args.norm().affine(channel);\n    apply_share",
    ),
    "backward: no barrier behind the affines": (
        ACT, "    __syncthreads();\n    Affine<A> affine[kLanes<kOrder, V>];", "    Affine<A> affine[kLanes<kOrder, V>];",
    ),
    "backward: no barrier behind what dx needs": (
        ACT, "      __syncthreads();\n      input_grad_share", "      input_grad_share",
    ),
    "backward: the masked gradient is not kept": (ACT, "          if (kFromOutput) write<V>(args.masked + offset, loaded.grad);\n", ""),
    "backward: the activation's derivative at x": (
        ACT, "act.backward(get<A>(loaded.grad, i), normalize(x, affine[lane]))", "act.backward(get<A>(loaded.grad, i), x)",
    ),
    "backward: a ReLU's mask for every activation": (
        ACT, "run(MaskConstant<Mask::activation>{});", "run(MaskConstant<Mask::from_input>{});",
    ),
    "backward: every block writes the sums, before they are known": (ACT, "if (team.writes) {\n        args.dbias", "if (true) {\n        args.dbias"),
    "backward, second pass: constants overwritten while they are read": (
        ACT, "    __syncthreads();  // the last group's constants have been read\n    if (threadIdx.x < plan.group_channels && channel < plan.channels) {",
        "    if (threadIdx.x < plan.group_channels && channel < plan.channels) {",
    ),
    "backward, second pass: no barrier behind the constants": (ACT, ".back;\n    }\n    __syncthreads();", ".back;\n    }"),
    # activations
    "silu: the derivative without its second term": (ACTIVATION, "return grad * s * (A(1) + z * (A(1) - s));", "return grad * s;"),
    "hardswish: a gradient from below the joint": (
        ACTIVATION, "relu_backward(z < A(3) ? grad * (z / A(3) + A(0.5)) : grad, z + A(3))", "(z < A(3) ? grad * (z / A(3) + A(0.5)) : grad)",
    ),
    "relu6: a gradient from beyond 6": (ACTIVATION, "relu_backward(z >= A(6) ? A(0) : grad, z)", "relu_backward(grad, z)"),
    "leaky_relu: the slope of positive values": (ACTIVATION, "z > A(0) ? grad : grad * slope", "z > A(0) ? grad * slope : grad"),
    "gelu: the derivative without the density": (
        ACTIVATION, "grad * (below(z) + z * (kDensity * exp_of(A(-0.5) * z * z)))", "grad * below(z)",
    ),
    "walk: 32-bit offsets": (TEAMS, "    int64_t offset[kBatch];", "    int offset[kBatch];"),
    # max-pool
    "max-pool: a value behind the window's end": (POOL, "if (i + k / kTaps < end && j + k % kTaps < end_column)", "if (i + k / kTaps < end)"),
    "max-pool: the padding's row is read": (POOL, "const int first_row = max(-top, 0), end_row", "const int first_row = max(-top - 1, 0), end_row"),
    "max-pool rows: the value on the left of a row": (POOL, "if (!padded) left[row] = from[-1];", "left[row] = from[-1];"),
    "max-pool: the last of equal values": (POOL, "if (value > best[v] || value != value) {", "if (value >= best[v] || value != value) {"),
    "max-pool sums: any byte is an address": (POOL, "const bool inside = i < map.rows.kernel && map.rows.has(h) && map.columns.has(w);", "const bool inside = true;"),
    "max-pool sums: no barrier between halves": (POOL, "    const int half = (lanes + 1) / 2;\n    __syncthreads();", "    const int half = (lanes + 1) / 2;"),
    "max-pool sums: an odd lane is lost": (POOL, "const int half = (lanes + 1) / 2;", "const int half = lanes / 2;"),
    "max-pool finish: a part too few": (POOL, "for (int i = threadIdx.x; i < parts; i += kThreads)", "for (int i = threadIdx.x; i < parts - 1; i += kThreads)"),
    "max-pool finish: every thread writes": (POOL, "  if (threadIdx.x > 0) return;\n", ""),
    "max-pool dx: one window too few": (POOL, "return min(by_stride.quotient(position + padding), windows - 1);", "return min(by_stride.quotient(position + padding), windows - 2);"),
    "max-pool dx: another row of the window": (POOL, "const int taken = tap >= 0 && tap < map.columns.kernel ? tap - from_window : -1;", "const int taken = tap - from_window;"),
    "max-pool: 32-bit offsets": (POOL, "return n * values + (c * of_channel", "return int(n * values) + (c * of_channel"),
    "mean: 32-bit offsets": (MEAN, "const int64_t begin =\n", "const int begin =\n"),
    "max-pool affines: past the last channel": (POOL, "if (channel < channels) affines", "affines"),
    "max-pool walk: a pixel too many": (POOL, "pixels = works ? (left + walk.lanes - 1) / walk.lanes : 0;", "pixels = works ? left / walk.lanes + 1 : 0;"),
    "division by a multiplication: one bit too few": (POOL, "shift(31) {", "shift(12) {"),
    # mean
    "mean: no barrier behind the constants": (MEAN, "  __syncthreads();\n  Affine<A> affine[kWidth];", "  Affine<A> affine[kWidth];"),
    "mean: no barrier behind the lanes' sums": (MEAN, "    __syncthreads();\n    const A* const all", "    const A* const all"),
    "mean: sums overwritten while they are read": (MEAN, "A(total / double(walk.map));\n    }\n    __syncthreads();", "A(total / double(walk.map));\n    }"),
    "mean: the tensor's end is passed": (MEAN, "if (left >= V) return read<V>(from);", "if (left >= 0) return read<V>(from);"),
    "mean: a neighbour's values in a joined vector": (MEAN, "if (!kJoined || (i >= before && i < before + walk.map))", "if (true)"),
    "mean: a lane too few": (MEAN, "for (int k = 0; k < walk.lanes; ++k) total +=", "for (int k = 1; k < walk.lanes; ++k) total +="),
    "mean: images past the last": (MEAN, "if (beside < walk.together && image < walk.images && channel < walk.channels) {", "if (beside < walk.together && channel < walk.channels) {"),
    "mean backward: a channel that may not exist": (MEAN, "if (kOrder == Order::joined && i == 1 && share.here >= V) continue;", ""),
    "mean backward: the gradient of the wrong channel": (MEAN, "(i < share.here ? loaded.grads[0] : loaded.grads[kGrads - 1])", "loaded.grads[0]"),
    "mean backward: no barrier behind what dx needs": (MEAN, "    __syncthreads();\n\n    InputGrad<A> back", "\n    InputGrad<A> back"),
    # vectors
    "vectors of 16 bytes wherever tensors begin": (COMMON, "return extent % width == 0 && aligned(tensors, width * sizeof(T));", "return extent % width == 0;"),
    "vectors that do not divide a row": (COMMON, "return extent % width == 0 && aligned(tensors, width * sizeof(T));", "return aligned(tensors, width * sizeof(T));"),
    "words: a neighbour's bits are lost": (COMMON, "words[i / kInWord] = others | uint32_t(bits) << shift;", "words[i / kInWord] = uint32_t(bits) << shift;"),
}  # fmt: skip


def run(folder, mutant, library):
    """What killed a mutant: (test, sentence), or None if nothing did."""
    environment = os.environ | {"AUGLOCAL_EMULATION": str(library), "PYTHONPATH": str(emulation.ROOT)}
    tests = emulation.ROOT / "tests" / "ops"
    for selection in (
        ["test_emulation.py", "-k", "order_of_threads or channels or 2_to_the or anywhere"],
        ["-m", "emulated"],
    ):
        paths = (
            [str(tests / selection[0]), *selection[1:]] if selection[0].endswith(".py") else [*selection, str(tests)]
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--long",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *paths,
        ]
        # Too slow a machine is no killer: no answer within the hour is an error of this program.
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, cwd=folder)
        if result.returncode == 1:
            test = re.search(r"^FAILED \S*?(\w+\.py)::(\w+)", result.stdout, re.MULTILINE)
            sentence = re.search(
                r"^E +(?:RuntimeError: emulated on [^:]*: )?(.*?)(?: \(thread .*)?$", result.stdout, re.MULTILINE
            )
            return f"{test[1]}::{test[2]}" if test else "?", sentence[1][:90] if sentence else "?"
        if result.returncode < 0:
            return paths[0], f"the process ends by signal {-result.returncode}"
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MUTANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        options.out = options.out.resolve()
    rows, alive = [], []
    for name in options.only:
        file, text, other = MUTANTS[name]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            csrc = Path(folder) / "csrc"
            shutil.copytree(emulation.ROOT / "csrc", csrc)
            source = (csrc / file).read_text()
            if text not in source:
                sys.exit(f"{name}: {file} has no such text any more")
            (csrc / file).write_text(source.replace(text, other, 1))
            killed = run(folder, name, emulation.build(csrc))
        if killed is None:
            alive.append(name)
        by = ("**lives**", "") if killed is None else killed
        rows.append(f"| {name} | {Path(file).name} | {by[0]} | {by[1].replace('|', '/')} |")
        print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    table = ["| mutant | file | killed by | which says |", "|---|---|---|---|", *rows]
    summary = f"{len(rows)} mutants of the CUDA kernels, {len(rows) - len(alive)} killed (`python tests/mutants.py`)."
    if options.out:
        options.out.write_text("\n".join([summary, "", *table, ""]))
    print(summary)
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
