// The search for the cheapest cut. auglocal_ext/search.py is the same in Python and says what everything means; this
// header and search.cpp follow it name by name, know nothing of Python, and return the same numbers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace auglocal {

struct Segment {
  int64_t high, net;
};

struct CutTable {
  std::vector<int64_t> input_bytes;
  std::vector<std::vector<Segment>> forward, backward;
  std::vector<Segment> head;
  std::vector<bool> identity;
  std::vector<int64_t> rebuild_length;
  int64_t longest_rebuild;
  std::vector<std::pair<int64_t, int64_t>> unit_macs;
  std::vector<int64_t> head_macs, head_state, unit_scratch, head_scratch;
  int64_t constant, carried;
};

struct Point {
  int64_t modules, bytes, macs;
  std::vector<int> borders;
};

// All of them throw std::invalid_argument where the table is malformed.
std::vector<std::vector<int64_t>> module_peaks(const CutTable& table);
std::vector<Point> front(const CutTable& table);
std::optional<Point> cheapest(const CutTable& table, int64_t budget, std::optional<int64_t> modules);
Point smallest(const CutTable& table);

}  // namespace auglocal
