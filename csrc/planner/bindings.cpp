// The Python module auglocal_ext._search: tables and points between Python and C++.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "search.h"

namespace py = pybind11;

py::object fronts(const std::vector<std::vector<std::vector<std::array<int64_t, 3>>>>& options, int64_t carried);

namespace pybind11::detail {

// A segment is a pair in Python.
template <>
struct type_caster<auglocal::Segment> {
  PYBIND11_TYPE_CASTER(auglocal::Segment, const_name("tuple[int, int]"));

  bool load(handle source, bool convert) {
    make_caster<std::pair<int64_t, int64_t>> pair;
    if (!pair.load(source, convert)) return false;
    std::tie(value.high, value.net) = cast_op<std::pair<int64_t, int64_t>>(pair);
    return true;
  }
};

}  // namespace pybind11::detail

namespace auglocal {
namespace {

template <class T>
void read(py::handle table, const char* name, T& field, const char* what) {
  try {
    field = table.attr(name).cast<T>();
  } catch (const py::cast_error&) {
    throw py::value_error(std::string("CutTable.") + name + " must be " + what);
  }
}

CutTable read_table(py::handle from) {
  const char *number = "a whole number", *numbers = "a list of whole numbers",
             *pairs = "a list of pairs of whole numbers", *variants = "a list of lists of pairs of whole numbers";
  CutTable table;
  read(from, "input_bytes", table.input_bytes, numbers);
  read(from, "forward", table.forward, variants);
  read(from, "backward", table.backward, variants);
  read(from, "head", table.head, pairs);
  read(from, "identity", table.identity, "a list of True and False");
  read(from, "rebuild_length", table.rebuild_length, numbers);
  read(from, "longest_rebuild", table.longest_rebuild, number);
  read(from, "unit_macs", table.unit_macs, pairs);
  read(from, "head_macs", table.head_macs, numbers);
  read(from, "head_state", table.head_state, numbers);
  read(from, "unit_scratch", table.unit_scratch, numbers);
  read(from, "head_scratch", table.head_scratch, numbers);
  read(from, "constant", table.constant, number);
  read(from, "carried", table.carried, number);
  return table;
}

// As the dataclass auglocal_ext.search.Point.
py::object to_python(const Point& point) {
  const py::object make = py::module_::import("auglocal_ext.search").attr("Point");
  return make(point.modules, point.bytes, point.macs, py::tuple(py::cast(point.borders)));
}

}  // namespace
}  // namespace auglocal

PYBIND11_MODULE(_search, module) {
  using namespace auglocal;
  module.doc() = "The compiled twin of auglocal_ext.search.";
  module.def("fronts", &fronts, py::arg("options"), py::arg("carried"));
  module.def(
      "module_peaks", [](py::object table) { return module_peaks(read_table(table)); }, py::arg("table"));
  module.def(
      "front",
      [](py::object table) {
        py::list points;
        for (const Point& point : front(read_table(table))) points.append(to_python(point));
        return points;
      },
      py::arg("table"));
  module.def(
      "cheapest",
      [](py::object table, int64_t budget, std::optional<int64_t> modules) -> py::object {
        const std::optional<Point> point = cheapest(read_table(table), budget, modules);
        return point ? to_python(*point) : py::none();
      },
      py::arg("table"), py::arg("budget"), py::arg("modules") = py::none());
  module.def(
      "smallest", [](py::object table) { return to_python(smallest(read_table(table))); }, py::arg("table"));
}
