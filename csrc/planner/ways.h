// The ways to run every local module that a backbone can be cut into: the compiled twin of
// auglocal_ext.planning.module_ways, which says what everything means.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace planner {

using std::vector;

using Segment = std::pair<int64_t, int64_t>;                                                   // high, net
using UnitWay = std::tuple<bool, vector<Segment>, vector<Segment>, std::array<int64_t, 2>>;    // again, ..., macs
using HeadWay = std::tuple<std::array<Segment, 2>, std::array<int64_t, 2>, int64_t, int64_t>;  // ..., state, scratch
using Way = std::tuple<int64_t, int64_t, int64_t, int, std::string>;  // macs, state, peak, head, again
using Ways = vector<vector<vector<Way>>>;                             // [i][j - i]

struct Table {
  vector<int64_t> input_bytes;
  vector<vector<UnitWay>> units;
  vector<vector<HeadWay>> heads;
  vector<bool> identity;
  vector<int64_t> rebuild_length;
  int64_t longest_rebuild;
  vector<int64_t> unit_scratch;
};

// Of labels that begin with macs, state and peak those than which no other is as good, by macs; of equals the first.
template <typename Label>
vector<Label> undominated(vector<Label> labels) {
  std::sort(labels.begin(), labels.end());
  vector<Label> kept;
  std::map<int64_t, int64_t> stairs;  // state -> peak, falling
  for (Label& label : labels) {
    const int64_t state = std::get<1>(label), peak = std::get<2>(label);
    auto next = stairs.upper_bound(state);
    if (next != stairs.begin() && std::prev(next)->second <= peak) continue;
    while (next != stairs.end() && next->second >= peak) next = stairs.erase(next);
    stairs[state] = peak;
    kept.push_back(std::move(label));
  }
  return kept;
}

class Modules {
 public:
  explicit Modules(Table table) : table_(std::move(table)) {}

  Ways ways() const {
    const int units = int(table_.input_bytes.size());
    Ways ways(units);
    for (int i = 0; i < units; ++i) {
      int64_t scratch = 0;
      std::map<State, vector<Beginning>> beginnings = {{{0, 0}, {Beginning{}}}};
      for (int j = i; j < units; ++j) {
        scratch = std::max(scratch, table_.unit_scratch[j]);
        ways[i].push_back(undominated(ended(i, j, beginnings, scratch)));
        beginnings = longer(i, j, beginnings);
      }
    }
    return ways;
  }

 private:
  using State = std::pair<int, int64_t>;  // the output before, `a` of a UnitWay; passes of its rebuild
  using Beginning = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, std::string>;

  vector<Way> ended(int i, int j, const std::map<State, vector<Beginning>>& beginnings, int64_t scratch) const {
    vector<Way> made;
    for (const auto& [state, labels] : beginnings)
      for (const auto& [again, forward, backward, unit_macs] : table_.units[j]) {
        const int variant = 3 * state.first + 2;
        for (int head = 0; head < int(table_.heads[j].size()); ++head) {
          const auto& [segments, head_macs, head_state, head_scratch] = table_.heads[j][head];
          const int64_t more = unit_macs[j > i] + head_macs[again], most = std::max(scratch, head_scratch);
          int64_t middle = 0, middle_net = 0;
          for (const Segment& s : {forward[variant], segments[again], backward[variant]})
            middle = std::max(middle, middle_net + s.first), middle_net += s.second;
          for (const auto& [macs, high, net, both, both_net, flags] : labels) {
            const int64_t peak = std::max({high, net + middle, both + middle_net, both_net + middle_net + most});
            made.emplace_back(macs + more, head_state, table_.input_bytes[i] + peak, head, flags + "01"[again]);
          }
        }
      }
    return made;
  }

  std::map<State, vector<Beginning>> longer(int i, int j, const std::map<State, vector<Beginning>>& beginnings) const {
    std::map<State, vector<Beginning>> longer;
    for (const auto& [state, labels] : beginnings)
      for (const auto& [again, forward, backward, unit_macs] : table_.units[j]) {
        const int64_t length = table_.identity[j] ? 1 + state.second : table_.rebuild_length[j];
        const bool kept = again || length > table_.longest_rebuild;
        const auto [higher, fuller] = forward[3 * state.first + kept];
        const auto [higher_back, fuller_back] = backward[3 * state.first + kept];
        vector<Beginning>& made = longer[again ? State{3, 0} : kept ? State{2, 0} : State{1, length}];
        for (const auto& [macs, high, net, both, both_net, flags] : labels)
          made.emplace_back(macs + unit_macs[j > i], std::max(high, net + higher), net + fuller,
                            std::max(net + fuller + higher_back, both + fuller + fuller_back),
                            both_net + fuller + fuller_back, flags + "01"[again]);
      }
    for (auto& [state, labels] : longer) labels = undominated_beginnings(std::move(labels));
    return longer;
  }

  static vector<Beginning> undominated_beginnings(vector<Beginning> labels) {
    std::sort(labels.begin(), labels.end());
    vector<Beginning> kept;
    for (Beginning& l : labels) {
      const auto& [macs, high, net, both, both_net, flags] = l;
      const bool worse = std::any_of(kept.begin(), kept.end(), [&](const Beginning& o) {
        return std::get<1>(o) <= high && std::get<2>(o) <= net && std::get<3>(o) <= both && std::get<4>(o) <= both_net;
      });
      if (!worse) kept.push_back(std::move(l));
    }
    return kept;
  }

  Table table_;
};

}  // namespace planner
