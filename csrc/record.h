// What many dictionaries hold, to see at each call of a network whether they hold it still: those of its modules. The
// same stands in Python in units/reading.py, which takes ten times as long: there are thousands of entries.
//
// Most of the time goes into fetching the objects from memory, so that what has to be looked at is asked for ahead, and
// several records are looked at together. Where Python says whether a dictionary has changed since it was compared (PEP
// 509, until Python 3.11), its entries are not looked at again, but for those that are dictionaries themselves.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "ops/kept.h"

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
      Holder holder = {kept(e[0]), e[1].cast<py::ssize_t>(), in_order ? nullptr : kept(e[2]), values_.size(),
                       inner_.size()};
      ahead_.push_back(holder.values);
      for (const py::handle value : expected) values_.push_back(kept(value));
      holder.end = values_.size();
      if (!in_order && PyDict_Check(holder.values))
        for (const py::handle name : e[2].cast<py::tuple>()) {
          PyObject* now = PyDict_GetItemWithError(holder.values, name.ptr());
          if (!now || !PyDict_Check(now)) continue;
          ahead_.push_back(now);
          inner_.push_back(py::reinterpret_borrow<py::object>(now));
        }
      holder.inner_end = inner_.size();
      holders_.push_back(holder);
    }
    for (const py::handle each : typed) {
      const auto pair = py::reinterpret_borrow<py::tuple>(each);
      typed_.push_back({kept(pair[0]), kept(pair[1])});
      ahead_.push_back(typed_.back().object);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  bool holds() {
    ask_ahead();
    return holds_now();
  }
  void ask_ahead() const {
    for (const PyObject* object : ahead_) __builtin_prefetch(object);
  }
  bool holds_now() {
    for (const Typed& each : typed_)
      if ((PyObject*)Py_TYPE(each.object) != each.type) return false;
    for (Holder& each : holders_) {
      if (is_untouched(each)) continue;
      if (!holds_still(each)) return false;
      note_version(each);
    }
    return true;
  }

 private:
  struct Holder {
    PyObject* values;
    py::ssize_t count;
    PyObject* names;  // or null: all values
    size_t begin, inner_begin, end = 0, inner_end = 0;
    uint64_t version = kNoVersion;  // in which it was last found to hold
  };
  struct Typed {
    PyObject *object, *type;
  };

  static constexpr uint64_t kNoVersion = 0;

  // The number that a dictionary gets anew with every change, and that no other dictionary has.
  static uint64_t version_of([[maybe_unused]] PyObject* values) {
#if PY_VERSION_HEX < 0x030C0000
    if (PyDict_Check(values)) return ((PyDictObject*)values)->ma_version_tag;
#endif
    return kNoVersion;
  }
  // Whether nothing was changed in a dictionary that held, nor put into the empty ones in it.
  bool is_untouched(const Holder& e) const {
    if (e.version == kNoVersion || e.version != version_of(e.values)) return false;
    for (size_t i = e.inner_begin; i < e.inner_end; ++i)
      if (PyDict_Size(inner_[i].ptr()) != 0) return false;
    return true;
  }
  // Notes that a dictionary holds as it is now. One with another that is new in it, or has entries, is compared always.
  void note_version(Holder& e) {
    e.version = kNoVersion;
    const uint64_t version = version_of(e.values);
    if (version == kNoVersion) return;
    size_t inner = e.inner_begin;
    for (size_t i = e.begin; e.names && i < e.end; ++i) {
      PyObject* now = PyDict_GetItemWithError(e.values, PyTuple_GET_ITEM(e.names, py::ssize_t(i - e.begin)));
      if (!now || !PyDict_Check(now)) continue;
      if (inner == e.inner_end || PyDict_Size(now) != 0) return;
      inner_[inner++] = py::reinterpret_borrow<py::object>(now);
    }
    if (inner == e.inner_end) e.version = version;
  }
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
  std::vector<py::object> inner_;  // the dictionaries that entries are: those of hooks
  std::vector<PyObject*> ahead_;
  std::vector<py::object> kept_;
  py::object absent_;
  bool identical_;
};

// Several records, and tensors that are kept: all that units which run as one depend on.
class Records {
 public:
  // kept: the number of the tensors.
  Records(const py::list& records, int64_t kept)
      : owners_(records), kept_(ops::Kept::find<ops::KeptTensors>(kept, "kept")) {
    for (const py::handle each : records) records_.push_back(each.cast<Record*>());
  }
  // Whether all records hold, and all tensors have the dtype, the device, the sizes and the strides that they had.
  bool hold() const {
    for (const Record* each : records_) each->ask_ahead();
    kept_->ask_ahead();
    for (Record* each : records_)
      if (!each->holds_now()) return false;
    return kept_->hold();
  }

 private:
  py::list owners_;
  std::vector<Record*> records_;
  std::shared_ptr<const ops::KeptTensors> kept_;
};

}  // namespace dx
