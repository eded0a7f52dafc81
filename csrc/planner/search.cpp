// The Python module auglocal_ext._search: the compiled twin of auglocal_ext.search.fronts, which says what everything
// means. Returns the same, ties included.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using std::vector;

using Label = std::array<int64_t, 3>;               // macs, state, peak; of a cut, or of one way to run a module
using Options = vector<vector<vector<Label>>>;      // [i][j - i]: the ways to run the module of units i..j
using Modules = vector<std::pair<int, int>>;        // (last unit, option) of each
using Cut = std::tuple<int64_t, int64_t, Modules>;  // bytes, macs

// The labels than which no other is as good, by macs.
vector<Label> undominated(vector<Label> labels) {
  std::sort(labels.begin(), labels.end());
  labels.erase(std::unique(labels.begin(), labels.end()), labels.end());
  vector<Label> kept;
  std::map<int64_t, int64_t> stairs;  // state -> peak, falling
  for (const Label& label : labels) {
    const auto [macs, state, peak] = label;
    auto next = stairs.upper_bound(state);
    if (next != stairs.begin() && std::prev(next)->second <= peak) continue;
    while (next != stairs.end() && next->second >= peak) next = stairs.erase(next);
    stairs[state] = peak;
    kept.push_back(label);
  }
  return kept;
}

class Search {
 public:
  explicit Search(Options options) : options_(std::move(options)), units_(int(options_.size())) {
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
      for (const auto& [macs, state, peak] : options_[i][j - i])
        for (const Label& e : endings_[count - 1][j + 1])
          labels.push_back({macs + e[0], state + e[1], std::max(peak, e[2])});
    return labels;
  }

  // Of the cuts of so many bytes and macs the one whose modules come first: each the first that leaves an ending.
  Modules modules(int count, int64_t size, int64_t macs) const {
    Modules modules;
    int64_t state = 0, high = 0;
    for (int first = 0; first < units_; first = modules.back().first + 1) {
      const auto [j, option] = first_way(count - int(modules.size()) - 1, first, size - state, macs, high);
      const Label& way = options_[first][j - first][option];
      macs -= way[0], state += way[1], high = std::max(high, way[2]);
      modules.emplace_back(j, option);
    }
    return modules;
  }

  std::pair<int, int> first_way(int count, int first, int64_t size, int64_t macs, int64_t high) const {
    for (int j = first; j < units_; ++j) {
      const vector<Label>& endings = endings_[count][j + 1];
      for (int option = 0; option < int(options_[first][j - first].size()); ++option) {
        const Label& way = options_[first][j - first][option];
        auto e = std::lower_bound(endings.begin(), endings.end(), Label{macs - way[0], INT64_MIN, INT64_MIN});
        for (; e != endings.end() && (*e)[0] == macs - way[0]; ++e)
          if (way[1] + (*e)[1] + std::max({high, way[2], (*e)[2]}) <= size) return {j, option};
      }
    }
    throw std::logic_error("no cut has these costs");
  }

  Options options_;
  int units_;
  vector<vector<vector<Label>>> endings_;  // [number of modules][first unit]
};

}  // namespace

PYBIND11_MODULE(_search, module) {
  module.doc() = "The compiled twin of the core of auglocal_ext.search.";
  module.def("fronts", [](Options options) { return Search(std::move(options)).fronts(); }, pybind11::arg("options"));
}
