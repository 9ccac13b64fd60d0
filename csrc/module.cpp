// The Python module: what is not a tensor operator. It lives in the library of the operators (ops/), which Python
// therefore loads with it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/levels.h"
#include "cpu/winograd_use.h"
#if defined(USE_CUDA)
#include "cuda/kernels.h"
#endif
#include "ops/kept.h"
#include "record.h"

namespace {

pybind11::dict build_facts() {
  pybind11::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
  facts["torch"] = DX_BUILD_TORCH;
  facts["cuda"] = DX_BUILD_CUDA;
  facts["cuda_architectures"] = DX_BUILD_ARCHS;
  facts["why_no_cuda"] = DX_BUILD_NO_CUDA;
  return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts of densenet_ext, what of its Python has to be fast, and the hooks that its tests need.";
  m.def("build_facts", &build_facts, "Compiler, torch and CUDA that this was built with.");
  m.def("simd_level", [] { return std::string(dx::cpu::level().name); }, "The SIMD level in use.");
  m.def(
      "simd_levels",
      [] {
        std::vector<std::string> names;
        for (const dx::cpu::Level* level : dx::cpu::levels()) names.push_back(level->name);
        return names;
      },
      "The SIMD levels of this build on this processor, narrowest first.");
  m.def(
      "set_simd_level",
      [](const std::string& name) {
        if (!dx::cpu::set_level(name)) throw pybind11::value_error("no SIMD level '" + name + "' on this processor");
      },
      pybind11::arg("name"), "Use another SIMD level, for tests.");
  m.def(
      "set_winograd",
      [](const std::string& use) {
        if (!dx::cpu::set_winograd_use(use))
          throw pybind11::value_error("expected 'faster', 'always' or 'never', got '" + use + "'");
      },
      pybind11::arg("use"), "Where 3x3 convolutions on the CPU take Winograd's products.");
  pybind11::class_<dx::Record>(m, "Record", "What dictionaries hold, and of which classes objects are.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&, pybind11::object, bool>(),
           pybind11::arg("entries"), pybind11::arg("typed"), pybind11::arg("absent"), pybind11::arg("identical"))
      .def("holds", &dx::Record::holds, "Whether they hold it still.");
  pybind11::class_<dx::Records>(m, "Records", "Several records, and tensors that are kept, looked at as one.")
      .def(pybind11::init<const pybind11::list&, int64_t>(), pybind11::arg("records"), pybind11::arg("kept"))
      .def("hold", &dx::Records::hold, "Whether the records hold, and the tensors have the form that they had.");
  m.def("kept_hold", &dx::ops::kept_hold, pybind11::arg("kept"),
        "The operator of this name, without the time that a call through the dispatcher takes.");
#if defined(USE_CUDA)
  m.def(
      "why_no_kernel",
      []() -> pybind11::object {
        const cudaError_t error = dx::cuda::find_kernel();
        if (error == cudaSuccess) return pybind11::none();
        return pybind11::str(cudaGetErrorString(error));
      },
      "Why the kernels do not run on the current GPU, or None: the driver finds none for it, say.");
#endif
}
