// The search for the cheapest cut; see search.h.
#include "search.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace auglocal {
namespace {

using std::vector;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The constants of search.py.
constexpr size_t kCaps = 512, kMostPoints = 60, kRanges = 256;
constexpr int kSlopes = 16, kMostUnits = 1000;
constexpr int64_t kMostBytes = int64_t(1) << 40, kMostMacs = int64_t(1) << 50;

// ---- what a table must be -----------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

void check_numbers(const char* name, const vector<int64_t>& numbers, int64_t most) {
  for (int64_t number : numbers)
    if (number < 0 || number > most)
      refuse(std::string("CutTable.") + name + " must be from 0 to " + std::to_string(most));
}

void check_segments(const char* name, const vector<Segment>& segments) {
  for (const Segment& s : segments)
    if (s.high < std::max<int64_t>(0, s.net) || s.high > kMostBytes || s.net < -kMostBytes)
      refuse(std::string("CutTable.") + name + " must have max(0, net) <= high in each segment, and numbers up to " +
             std::to_string(kMostBytes));
}

void check(const CutTable& table) {
  const size_t units = table.input_bytes.size();
  if (units < 1 || units > kMostUnits)
    refuse("a CutTable must have from 1 to " + std::to_string(kMostUnits) + " units, given " + std::to_string(units));
  const auto check_length = [&](const char* name, size_t length) {
    if (length != units)
      refuse(std::string("CutTable.") + name + " must have an entry for each of the " + std::to_string(units) +
             " units, given " + std::to_string(length));
  };
  check_length("forward", table.forward.size());
  check_length("backward", table.backward.size());
  check_length("head", table.head.size());
  check_length("identity", table.identity.size());
  check_length("rebuild_length", table.rebuild_length.size());
  check_length("unit_macs", table.unit_macs.size());
  check_length("head_macs", table.head_macs.size());
  check_length("head_state", table.head_state.size());
  check_length("unit_scratch", table.unit_scratch.size());
  check_length("head_scratch", table.head_scratch.size());
  const auto check_variants = [](const char* name, const vector<vector<Segment>>& variants) {
    for (const vector<Segment>& segments : variants)
      if (segments.size() != 9) refuse(std::string("CutTable.") + name + " must have 9 variants for each unit");
    for (const vector<Segment>& segments : variants) check_segments(name, segments);
  };
  check_variants("forward", table.forward);
  check_variants("backward", table.backward);
  check_segments("head", table.head);
  check_numbers("input_bytes", table.input_bytes, kMostBytes);
  check_numbers("head_state", table.head_state, kMostBytes);
  check_numbers("unit_scratch", table.unit_scratch, kMostBytes);
  check_numbers("head_scratch", table.head_scratch, kMostBytes);
  check_numbers("rebuild_length", table.rebuild_length, kMostBytes);
  check_numbers("constant", {table.constant}, kMostBytes);
  check_numbers("carried", {table.carried}, kMostBytes);
  check_numbers("longest_rebuild", {table.longest_rebuild}, kMostBytes);
  check_numbers("head_macs", table.head_macs, kMostMacs);
  for (const auto& [first, otherwise] : table.unit_macs) check_numbers("unit_macs", {first, otherwise}, kMostMacs);
  if (table.head_state.back() != 0)
    refuse("CutTable.head_state must be 0 for the last unit: its head is the model's own classifier");
}

// ---- what a cut costs -----------------------------------------------------------------------------------

// The variant of every unit of a module: which outputs are kept in it, because a rebuild would walk too far.
vector<int> variants(const CutTable& table, int first, int last) {
  vector<int> result;
  int before = 0;
  int64_t walked = 0;  // passes of a rebuild of the output before; none from a kept one
  for (int k = first; k <= last; ++k) {
    const int64_t length = table.identity[k] ? 1 + walked : table.rebuild_length[k];
    const bool kept = length > table.longest_rebuild;
    result.push_back(3 * before + (k == last ? 2 : int(kept)));
    before = kept ? 2 : 1;
    walked = kept ? 0 : length;
  }
  return result;
}

int64_t peak_of(const CutTable& table, int first, int last) {
  const vector<int> variant = variants(table, first, last);
  int64_t live = table.input_bytes[first], peak = live, scratch = table.head_scratch[last];
  const auto pass = [&](const Segment& segment) {
    peak = std::max(peak, live + segment.high);
    live += segment.net;
  };
  for (int k = first; k <= last; ++k) pass(table.forward[k][variant[k - first]]);
  pass(table.head[last]);
  for (int k = last; k >= first; --k) pass(table.backward[k][variant[k - first]]);
  for (int k = first; k <= last; ++k) scratch = std::max(scratch, table.unit_scratch[k]);
  return std::max(peak, live + scratch);
}

struct Range {
  int64_t lowest, highest;
};

// A table as the search needs it, by module of units i..j.
struct Cuts {
  int units;
  vector<vector<int64_t>> peaks, macs;
  vector<int64_t> state;
  int64_t constant, carried;

  explicit Cuts(const CutTable& table)
      : units(int(table.input_bytes.size())),
        peaks(module_peaks(table)),
        macs(units, vector<int64_t>(units)),
        state(table.head_state),
        constant(table.constant),
        carried(table.carried) {
    for (int i = 0; i < units; ++i) {
      int64_t body = table.unit_macs[i].first;
      for (int j = i; j < units; ++j) {
        if (j > i) body += table.unit_macs[j].second;
        macs[i][j] = body + table.head_macs[j];
      }
    }
  }

  // The same with L + 1 for a byte and one for each module: of as many bytes, fewer modules are less.
  Cuts counting_modules() const {
    Cuts cuts = *this;
    const int64_t scale = units + 1;
    for (vector<int64_t>& row : cuts.peaks)
      for (int64_t& peak : row) peak *= scale;
    for (int64_t& s : cuts.state) s = scale * s + 1;
    cuts.constant *= scale;
    cuts.carried *= scale;
    return cuts;
  }

  Point point(const vector<int>& borders) const {
    Point point{int64_t(borders.size()) + 1, 0, 0, borders};
    int64_t bytes = constant, high = 0;
    int first = 0;
    for (size_t index = 0; index <= borders.size(); ++index) {
      const int last = index < borders.size() ? borders[index] : units - 1;
      point.macs += macs[first][last];
      bytes += state[last];
      high = std::max(high, peaks[first][last] + carried * int64_t(index));
      first = last + 1;
    }
    point.bytes = bytes + high;
    return point;
  }

  // All peaks in at most so many ranges, rising.
  vector<Range> peak_ranges(size_t most) const {
    std::set<int64_t> distinct;
    for (int i = 0; i < units; ++i) distinct.insert(peaks[i].begin() + i, peaks[i].end());
    const vector<int64_t> rising(distinct.begin(), distinct.end());
    vector<Range> ranges(std::min(most, rising.size()));
    const auto start = [&](size_t k) { return k * rising.size() / ranges.size(); };
    for (size_t k = 0; k < ranges.size(); ++k) ranges[k] = {rising[start(k)], rising[start(k + 1) - 1]};
    return ranges;
  }
};

struct Weights {
  double macs, bytes;

  double sum(int64_t of_macs, int64_t of_bytes) const { return macs * double(of_macs) + bytes * double(of_bytes); }
};

// The best cuts of units 0..i-1, for every i, under a cap on the modules' peaks.
class Beginnings {
 public:
  Beginnings(const Cuts& cuts, int64_t cap, Weights weights, int count)
      : one_(std::min(count, 1)),
        price_(count + 1, vector<double>(cuts.units + 1, kInfinity)),
        first_(count + 1, vector<int>(cuts.units + 1)) {
    price_[0][0] = 0;
    for (int j = 0; j < cuts.units; ++j) {
      for (int i = 0; i <= j; ++i) {
        if (cuts.peaks[i][j] > cap) continue;
        const double price = weights.sum(cuts.macs[i][j], cuts.state[j]);
        for (int n = one_; n <= std::min(count, j + 1); ++n) {
          const double total = price_[n - one_][i] + price;
          if (total < price_[n][j + 1]) price_[n][j + 1] = total, first_[n][j + 1] = i;
        }
      }
    }
  }

  double price(int n, int i) const { return price_[n][i]; }

  // Of the best cut of all units.
  vector<int> borders(int n) const {
    vector<int> borders;
    for (int first = first_[n].back(); first > 0; first = first_[n][first]) {
      borders.push_back(first - 1);
      n -= one_;
    }
    std::reverse(borders.begin(), borders.end());
    return borders;
  }

 private:
  int one_;
  vector<vector<double>> price_;
  vector<vector<int>> first_;
};

// ---- the front --------------------------------------------------------------------------------------------

vector<Point> not_worse(vector<Point> points) {
  std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
    return std::tie(a.bytes, a.macs, a.borders) < std::tie(b.bytes, b.macs, b.borders);
  });
  vector<Point> kept;
  for (Point& point : points)
    if (kept.empty() || point.macs < kept.back().macs) kept.push_back(std::move(point));
  return kept;
}

vector<Point> thinned(const vector<Point>& points) {
  if (points.size() <= kMostPoints) return points;
  vector<Point> some;
  for (size_t k = 0; k < kMostPoints; ++k) some.push_back(points[k * (points.size() - 1) / (kMostPoints - 1)]);
  return some;
}

// ---- the cheapest cut -------------------------------------------------------------------------------------

// A cut of units i..L-1; high: its highest live bytes if nothing comes before it.
struct Ending {
  int64_t macs, state, high;

  auto tie() const { return std::tie(macs, state, high); }
};

// The least weighted sum of macs and bytes that a cut with a given ending may have.
class Bound {
 public:
  Bound(const Cuts& cuts, int count, Weights weights) : weights(weights), count_(count), units_(cuts.units) {
    vector<Beginnings> beginnings;
    for (const Range& range : cuts.peak_ranges(kRanges)) {
      lowest_.push_back(range.lowest);
      beginnings.emplace_back(cuts, range.highest, weights, count);
    }
    const int ranges = int(lowest_.size());
    rest_.assign(size_t(count + 1) * (units_ + 1) * (ranges + 1), kInfinity);
    for (int n = 0; n <= count; ++n)
      for (int i = 0; i <= units_; ++i)
        for (int t = ranges - 1; t >= 0; --t)
          rest_[at(n, i) + t] =
              std::min(rest_[at(n, i) + t + 1], beginnings[t].price(n, i) + weights.bytes * double(lowest_[t]));
    const double* whole = &rest_[at(count, units_)];
    int t = ranges - 1;
    while (whole[t] != whole[0]) --t;
    best = cuts.point(beginnings[t].borders(count));
  }

  // The bound of cuts that end so, in units i..L-1 and n counted modules.
  double of(int n, int i, const Ending& ending) const {
    const auto above = std::upper_bound(lowest_.begin(), lowest_.end(), ending.high) - lowest_.begin();
    return weights.sum(ending.macs, ending.state) + rest_[at(count_ - n, i) + std::max<int64_t>(above - 1, 0)];
  }

  Weights weights;
  Point best;  // a whole cut whose sum is about the least

 private:
  size_t at(int n, int i) const { return (size_t(n) * (units_ + 1) + i) * (lowest_.size() + 1); }

  int count_, units_;
  vector<int64_t> lowest_;
  // [at(n, i) + t]: what the best beginning adds whose highest peak is in range t or a higher one
  vector<double> rest_;
};

struct Limit {
  Bound bound;
  double most;
};

// One on bytes; and where a cut is known that fits, one on macs and bytes together.
vector<Limit> limits_of(const Cuts& cuts, int count, int64_t budget) {
  vector<Limit> limits{{Bound(cuts, count, {0, 1}), double(budget)}};
  Point fits = limits[0].bound.best;
  if (fits.bytes > budget) return limits;
  std::optional<Point> beyond;
  int64_t least_macs = fits.macs;
  Bound bound(cuts, count, {1, 0});
  for (int k = 0; k < kSlopes; ++k) {
    const Point best = bound.best;
    if (beyond && bound.weights.sum(best.macs, best.bytes) >= bound.weights.sum(fits.macs, fits.bytes)) break;
    if (best.bytes <= budget) {
      fits = best;
      least_macs = std::min(least_macs, best.macs);
    } else {
      beyond = best;
    }
    if (!beyond || fits.macs <= beyond->macs) break;
    const double slope = double(fits.macs - beyond->macs) / double(beyond->bytes - fits.bytes);
    bound = Bound(cuts, count, {1, slope});
  }
  const double most = bound.weights.sum(least_macs, budget);
  limits.push_back({std::move(bound), most});
  return limits;
}

// Those than which no other one is as good in all three numbers.
vector<Ending> undominated(vector<Ending> endings) {
  std::sort(endings.begin(), endings.end(), [](const Ending& a, const Ending& b) { return a.tie() < b.tie(); });
  vector<Ending> kept, stairs;  // stairs: kept ones, high falling as state rises
  for (const Ending& ending : endings) {
    const auto at = std::upper_bound(stairs.begin(), stairs.end(), ending.state,
                                     [](int64_t state, const Ending& stair) { return state < stair.state; });
    if (at != stairs.begin() && std::prev(at)->high <= ending.high) continue;
    kept.push_back(ending);
    const auto end = std::find_if(at, stairs.end(), [&](const Ending& stair) { return stair.high < ending.high; });
    stairs.insert(stairs.erase(at, end), ending);
  }
  return kept;
}

// [n][i]: the endings of units i..L-1 in n counted modules, with the constant.
using Endings = vector<vector<vector<Ending>>>;

Endings endings_of(const Cuts& cuts, int count, const vector<Limit>& limits) {
  const int one = std::min(count, 1);
  const auto within = [&](int n, int i, const Ending& ending) {
    return std::all_of(limits.begin(), limits.end(), [&](const Limit& limit) {
      return limit.bound.of(n, i, ending) <= limit.most + 1e-9 * limit.most + 1e-3;  // what rounding may have added
    });
  };
  Endings endings(count + 1, vector<vector<Ending>>(cuts.units + 1));
  endings[0][cuts.units].push_back({0, cuts.constant, -cuts.carried});
  for (int i = cuts.units - 1; i >= 0; --i) {
    for (int n = one; n <= count; ++n) {
      vector<Ending> longer;
      for (int j = i; j < cuts.units; ++j) {
        for (const Ending& e : endings[n - one][j + 1]) {
          const Ending ending{e.macs + cuts.macs[i][j], e.state + cuts.state[j],
                              std::max(cuts.peaks[i][j], e.high + cuts.carried)};
          if (within(n, i, ending)) longer.push_back(ending);
        }
      }
      endings[n][i] = undominated(std::move(longer));
    }
  }
  return endings;
}

// Of the cuts within macs and bytes the one whose borders come first: each the first one that leaves an ending.
vector<int> first_borders(const Cuts& cuts, int count, const Endings& endings, int64_t macs, int64_t bytes) {
  const int one = std::min(count, 1);
  vector<int> borders;
  int64_t state = 0, high = 0;
  for (int first = 0; first < cuts.units; first = borders.back() + 1, count -= one) {
    const int64_t index = int64_t(borders.size());
    const auto high_with = [&](int j) { return std::max(high, cuts.peaks[first][j] + cuts.carried * index); };
    const auto leaves_an_ending = [&](int j) {
      const vector<Ending>& rest = endings[count - one][j + 1];
      return std::any_of(rest.begin(), rest.end(), [&](const Ending& e) {
        const int64_t highest = std::max(high_with(j), e.high + cuts.carried * (index + 1));
        return cuts.macs[first][j] + e.macs <= macs && state + cuts.state[j] + e.state + highest <= bytes;
      });
    };
    int j = first;
    while (!leaves_an_ending(j)) ++j;
    macs -= cuts.macs[first][j];
    state += cuts.state[j];
    high = high_with(j);
    borders.push_back(j);
  }
  borders.pop_back();
  return borders;
}

std::optional<Point> cheapest_of(const Cuts& cuts, int64_t budget, int count) {
  const Cuts counting = cuts.counting_modules();
  budget = (budget + 1) * (cuts.units + 1) - 1;
  const Endings endings = endings_of(counting, count, limits_of(counting, count, budget));
  const Ending* best = nullptr;
  const auto cost = [](const Ending& e) { return std::pair(e.macs, e.state + e.high); };
  for (const Ending& e : endings[count][0])
    if (e.state + e.high <= budget && (!best || cost(e) < cost(*best))) best = &e;
  if (!best) return std::nullopt;
  return cuts.point(first_borders(counting, count, endings, best->macs, best->state + best->high));
}

}  // namespace

vector<vector<int64_t>> module_peaks(const CutTable& table) {
  check(table);
  const int units = int(table.input_bytes.size());
  vector<vector<int64_t>> peaks(units, vector<int64_t>(units));
  for (int i = 0; i < units; ++i)
    for (int j = i; j < units; ++j) peaks[i][j] = peak_of(table, i, j);
  return peaks;
}

vector<Point> front(const CutTable& table) {
  const Cuts cuts(table);
  int64_t macs = 0, state = 0;
  for (int64_t m : table.head_macs) macs += m;
  for (int64_t s : table.head_state) state += s;
  const double even = double(std::max<int64_t>(macs, 1)) / double(std::max<int64_t>(state, 1));
  vector<std::set<vector<int>>> found(cuts.units + 1);
  const Point least = smallest(table);
  found[least.modules].insert(least.borders);
  for (double weight : {1e-9 * even, 0.25 * even, even, 4 * even, 1e9 * even}) {
    for (const Range& range : cuts.peak_ranges(kCaps)) {
      const Beginnings beginnings(cuts, range.highest, {1, weight}, cuts.units);
      for (int n = 1; n <= cuts.units; ++n)
        if (beginnings.price(n, cuts.units) < kInfinity) found[n].insert(beginnings.borders(n));
    }
  }
  vector<Point> result;
  for (const std::set<vector<int>>& cuts_of_n : found) {
    vector<Point> points;
    for (const vector<int>& borders : cuts_of_n) points.push_back(cuts.point(borders));
    for (Point& point : thinned(not_worse(std::move(points)))) result.push_back(std::move(point));
  }
  return result;
}

std::optional<Point> cheapest(const CutTable& table, int64_t budget, std::optional<int64_t> modules) {
  const Cuts cuts(table);
  if (modules && (*modules < 1 || *modules > cuts.units))
    refuse("modules must be from 1 to " + std::to_string(cuts.units) + ", the units of the table, given " +
           std::to_string(*modules));
  // No cut has fewer bytes than 0 or as many as 2^53: so far, and no further, the budget's product with L + 1 is safe.
  return cheapest_of(cuts, std::clamp<int64_t>(budget, -1, int64_t(1) << 53), int(modules.value_or(0)));
}

Point smallest(const CutTable& table) {
  const Cuts cuts(table);
  Cuts free = cuts;
  free.macs.assign(cuts.units, vector<int64_t>(cuts.units));
  Bound bound(free, 0, {0, 1});
  const double most = double(bound.best.bytes);
  const Endings endings = endings_of(free, 0, {{std::move(bound), most}});
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const Ending& e : endings[0][0]) least = std::min(least, e.state + e.high);
  return *cheapest_of(cuts, least, 0);
}

}  // namespace auglocal
