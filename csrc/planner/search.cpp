// The Python module auglocal_ext._search: the compiled twins of auglocal_ext.planning.module_ways.module_ways and
// auglocal_ext.planning.search.fronts, which say what everything means. Return the same, ties included.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "ways.h"

namespace {

using planner::undominated;
using planner::Way;
using planner::Ways;
using std::vector;

using Label = std::array<int64_t, 3>;               // macs, state, peak
using Modules = vector<std::pair<int, int>>;        // (last unit, way) of each
using Cut = std::tuple<int64_t, int64_t, Modules>;  // bytes, macs

class Search {
 public:
  explicit Search(Ways ways) : ways_(std::move(ways)), units_(int(ways_.size())) {
    endings_ = {vector<vector<Label>>(units_ + 1)};
    endings_[0][units_] = {{0, 0, 0}};
  }

  vector<vector<Cut>> fronts() {
    vector<vector<Cut>> found(units_);
    for (int count = 1; count <= units_; ++count) {
      endings_.emplace_back(units_ + 1);
      for (int i = 0; i <= units_ - count; ++i) endings_[count][i] = undominated(longer(count, i));
      vector<std::pair<int64_t, int64_t>> costs;
      for (const auto& [macs, state, peak] : endings_[count][0]) costs.emplace_back(state + peak, macs);
      std::sort(costs.begin(), costs.end());
      vector<Cut>& front = found[count - 1];
      for (const auto& [size, macs] : costs)
        if (front.empty() || macs < std::get<1>(front.back()))
          front.emplace_back(size, macs, modules(count, size, macs));
    }
    return found;
  }

 private:
  vector<Label> longer(int count, int i) const {
    vector<Label> labels;
    for (int j = i; j < units_; ++j)
      for (const auto& [macs, state, peak, head, again] : ways_[i][j - i])
        for (const Label& e : endings_[count - 1][j + 1])
          labels.push_back({macs + e[0], state + e[1], std::max(peak, e[2])});
    return labels;
  }

  // Of the cuts of so many bytes and macs the one whose modules come first: each the first that leaves an ending.
  Modules modules(int count, int64_t size, int64_t macs) const {
    Modules modules;
    int64_t state = 0, high = 0;
    for (int first = 0; first < units_; first = modules.back().first + 1) {
      const auto [j, index] = first_way(count - int(modules.size()) - 1, first, size - state, macs, high);
      const auto& [spent, head_state, peak, head, again] = ways_[first][j - first][index];
      macs -= spent, state += head_state, high = std::max(high, peak);
      modules.emplace_back(j, index);
    }
    return modules;
  }

  std::pair<int, int> first_way(int count, int first, int64_t size, int64_t macs, int64_t high) const {
    for (int j = first; j < units_; ++j) {
      const vector<Label>& endings = endings_[count][j + 1];
      for (int index = 0; index < int(ways_[first][j - first].size()); ++index) {
        const auto& [spent, state, peak, head, again] = ways_[first][j - first][index];
        auto e = std::lower_bound(endings.begin(), endings.end(), Label{macs - spent, INT64_MIN, INT64_MIN});
        for (; e != endings.end() && (*e)[0] == macs - spent; ++e)
          if (state + (*e)[1] + std::max({high, peak, (*e)[2]}) <= size) return {j, index};
      }
    }
    throw std::logic_error("no cut has these costs");
  }

  Ways ways_;
  int units_;
  vector<vector<vector<Label>>> endings_;  // [number of modules][first unit]
};

Ways module_ways(vector<int64_t> input_bytes, vector<vector<planner::UnitWay>> units,
                 vector<vector<planner::HeadWay>> heads, vector<bool> identity, vector<int64_t> rebuild_length,
                 int64_t longest_rebuild, vector<int64_t> unit_scratch) {
  planner::Table table{std::move(input_bytes),    std::move(units), std::move(heads),       std::move(identity),
                       std::move(rebuild_length), longest_rebuild,  std::move(unit_scratch)};
  return planner::Modules(std::move(table)).ways();
}

}  // namespace

PYBIND11_MODULE(_search, module) {
  module.doc() = "The compiled twins of the core of auglocal_ext.planning's search.";
  module.def("module_ways", &module_ways);
  module.def("fronts", [](Ways ways) { return Search(std::move(ways)).fronts(); }, pybind11::arg("ways"));
}
