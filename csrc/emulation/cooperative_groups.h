// The part of cooperative groups that the kernels use: the barrier of a grid, in two halves.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  struct arrival_token {};
  arrival_token barrier_arrive() const {
    emulation::grid_arrive();
    return {};
  }
  void barrier_wait(arrival_token&&) const { emulation::grid_wait(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
