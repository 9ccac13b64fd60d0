// What many dictionaries hold, to see at each call of a network whether they hold it still: those of its modules. The
// same stands in Python in units/reading.py, which takes ten times as long: there are thousands of entries.
//
// Most of the time goes into fetching the objects from memory, so that what has to be looked at is asked for ahead.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace dx {

namespace py = pybind11;

class Record {
 public:
  // entries: tuples of a dictionary, how many entries it has (-1: any number), some of their names, and their values;
  // names of None: all values, in their order. `absent` is the value of what is not there. typed: pairs of an object
  // and its class. identical: values have to be the same objects; else they may be equal ones.
  Record(const py::list& entries, const py::list& typed, py::object absent, bool identical)
      : absent_(std::move(absent)), identical_(identical) {
    for (const py::handle each : entries) {
      const auto e = py::reinterpret_borrow<py::tuple>(each);
      const auto expected = e[3].cast<py::tuple>();
      const bool in_order = e[2].is_none();
      Holder holder = {kept(e[0]), e[1].cast<py::ssize_t>(), in_order ? nullptr : kept(e[2]), values_.size()};
      ahead_.push_back(holder.values);
      for (const py::handle value : expected) values_.push_back(kept(value));
      holder.end = values_.size();
      if (!in_order && PyDict_Check(holder.values))
        for (const py::handle name : e[2].cast<py::tuple>()) {
          PyObject* now = PyDict_GetItemWithError(holder.values, name.ptr());
          if (now && PyDict_Check(now)) ahead_.push_back(kept(now));
        }
      holders_.push_back(holder);
    }
    for (const py::handle each : typed) {
      const auto pair = py::reinterpret_borrow<py::tuple>(each);
      typed_.push_back({kept(pair[0]), kept(pair[1])});
      ahead_.push_back(typed_.back().object);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  bool holds() const {
    for (PyObject* object : ahead_) __builtin_prefetch(object);
    for (const Typed& each : typed_)
      if ((PyObject*)Py_TYPE(each.object) != each.type) return false;
    for (const Holder& each : holders_)
      if (!holds_still(each)) return false;
    return true;
  }

 private:
  struct Holder {
    PyObject* values;
    py::ssize_t count;
    PyObject* names;  // or null: all values
    size_t begin, end = 0;
  };
  struct Typed {
    PyObject *object, *type;
  };

  PyObject* kept(py::handle object) {
    kept_.push_back(py::reinterpret_borrow<py::object>(object));
    return object.ptr();
  }
  bool holds_still(const Holder& e) const {
    const py::ssize_t size = PyDict_Check(e.values) ? PyDict_Size(e.values) : PyObject_Size(e.values);
    if (e.count >= 0 && size != e.count) return false;
    if (!e.names) {
      py::ssize_t at = 0;
      PyObject* value;
      for (size_t i = e.begin; PyDict_Next(e.values, &at, nullptr, &value); ++i)
        if (i >= e.end || value != values_[i]) return false;
      return true;
    }
    for (size_t i = e.begin; i < e.end; ++i) {
      PyObject* name = PyTuple_GET_ITEM(e.names, py::ssize_t(i - e.begin));
      if (PyDict_Check(e.values)) {
        PyObject* now = PyDict_GetItemWithError(e.values, name);
        if (!now && PyErr_Occurred()) throw py::error_already_set();
        if (!same(now ? now : absent_.ptr(), values_[i])) return false;
      } else {  // of a class
        py::object now = py::reinterpret_steal<py::object>(PyObject_GetItem(e.values, name));
        if (!now) {
          if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
          PyErr_Clear();
          now = absent_;
        }
        if (!same(now.ptr(), values_[i])) return false;
      }
    }
    return true;
  }
  bool same(PyObject* now, PyObject* expected) const {
    if (now == expected) return true;
    if (identical_) return false;
    // most are the dictionaries of hooks, and empty
    if (PyDict_Check(now) && PyDict_Check(expected) && PyDict_Size(expected) == 0) return PyDict_Size(now) == 0;
    const int equal = PyObject_RichCompareBool(now, expected, Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal == 1;
  }

  std::vector<Holder> holders_;
  std::vector<PyObject*> values_;
  std::vector<Typed> typed_;
  std::vector<PyObject*> ahead_;
  std::vector<py::object> kept_;
  py::object absent_;
  bool identical_;
};

}  // namespace dx
