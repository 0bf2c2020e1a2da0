// The Python face of the compiled module. Addresses arrive as integers; fastperc/_native.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using namespace fastperc;

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Norm norm_from_name(const std::string& name) {
  if (name == "l2") return Norm::l2;
  if (name == "l1") return Norm::l1;
  throw std::invalid_argument("fastperc: norm must be 'l2' or 'l1', got " + name);
}

RowShape row_shape(const std::array<std::int64_t, 5>& s) { return {s[0], s[1], s[2], s[3], s[4]}; }
ImageShape image_shape(const std::array<std::int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }
RowStrides row_strides(const std::array<std::int64_t, 3>& s) { return {s[0], s[1], s[2]}; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastperc's compiled kernels";

  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = FASTPERC_COMPILER;
#ifdef FASTPERC_CUDA
    info["cuda"] = FASTPERC_CUDA;
    info["architectures"] = FASTPERC_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
    info["architectures"] = "";
#endif
    return info;
  });

  m.def(
      "tv_loss_fwd_cpu",
      [](Address x, Address grad, Address loss, const std::string& dtype, const std::string& norm,
         const std::array<std::int64_t, 5>& shape, const std::array<std::int64_t, 3>& x_strides,
         const std::array<std::int64_t, 3>& grad_strides, int threads) {
        const DType type = dtype_from_name(dtype);
        const Norm kind = norm_from_name(norm);
        py::gil_scoped_release release;
        tv_loss_fwd_cpu(pointer<>(x), pointer<>(grad), pointer<>(loss), type, kind, row_shape(shape),
                        row_strides(x_strides), row_strides(grad_strides), threads);
      },
      py::arg("x"), py::arg("grad"), py::arg("loss"), py::arg("dtype"), py::arg("norm"), py::arg("shape"),
      py::arg("x_strides"), py::arg("grad_strides"), py::arg("threads"));

  m.def(
      "relu_mask_fwd_cpu",
      [](Address x, Address bits, const std::string& dtype, std::int64_t count, int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        relu_mask_fwd_cpu(pointer<>(x), pointer<>(bits), type, count, threads);
      },
      py::arg("x"), py::arg("bits"), py::arg("dtype"), py::arg("count"), py::arg("threads"));
  m.def(
      "relu_mask_bwd_cpu",
      [](Address grad, Address bits, const std::string& dtype, std::int64_t count, int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        relu_mask_bwd_cpu(pointer<>(grad), pointer<>(bits), type, count, threads);
      },
      py::arg("grad"), py::arg("bits"), py::arg("dtype"), py::arg("count"), py::arg("threads"));
  m.def(
      "relu_pool_fwd_cpu",
      [](Address x, Address pooled, Address winners, const std::string& dtype, const std::array<std::int64_t, 4>& shape,
         std::int64_t images_with_winners, int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        relu_pool_fwd_cpu(pointer<>(x), pointer<>(pooled), pointer<>(winners), type, image_shape(shape),
                          images_with_winners, threads);
      },
      py::arg("x"), py::arg("pooled"), py::arg("winners"), py::arg("dtype"), py::arg("shape"),
      py::arg("images_with_winners"), py::arg("threads"));
  m.def(
      "relu_pool_bwd_cpu",
      [](Address grad_pooled, Address winners, Address grad, const std::string& dtype,
         const std::array<std::int64_t, 4>& shape, int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        relu_pool_bwd_cpu(pointer<>(grad_pooled), pointer<>(winners), pointer<>(grad), type, image_shape(shape),
                          threads);
      },
      py::arg("grad_pooled"), py::arg("winners"), py::arg("grad"), py::arg("dtype"), py::arg("shape"),
      py::arg("threads"));

#ifdef FASTPERC_CUDA
  m.def(
      "tv_loss_partials", [](const std::array<std::int64_t, 5>& shape) { return tv_loss_partials(row_shape(shape)); },
      py::arg("shape"));
  m.def(
      "tv_loss_fwd_cuda",
      [](Address x, Address grad, Address loss, Address partials, const std::string& dtype, const std::string& norm,
         const std::array<std::int64_t, 5>& shape, const std::array<std::int64_t, 3>& x_strides,
         const std::array<std::int64_t, 3>& grad_strides, Address stream) {
        tv_loss_fwd_cuda(pointer<>(x), pointer<>(grad), pointer<>(loss), pointer<>(partials), dtype_from_name(dtype),
                         norm_from_name(norm), row_shape(shape), row_strides(x_strides), row_strides(grad_strides),
                         pointer<>(stream));
      },
      py::arg("x"), py::arg("grad"), py::arg("loss"), py::arg("partials"), py::arg("dtype"), py::arg("norm"),
      py::arg("shape"), py::arg("x_strides"), py::arg("grad_strides"), py::arg("stream"));
#endif
}
