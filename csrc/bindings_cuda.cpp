// The Python bindings of the launchers of CUDA kernels, where the module is built with nvcc. They return before the
// kernels have run, in the order of a stream.
#ifdef FASTPERC_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "kernels.h"

namespace fastperc {
namespace {

namespace py = pybind11;

// Images, channels, rows and columns; whether the activations are channels-last, and whether all images have one norm.
NormShape norm_shape(const std::array<std::int64_t, 6>& s) { return {s[0], s[1], s[2], s[3], s[4] != 0, s[5] != 0}; }

// An activation: its kind, the address of its slopes, and the slope of all channels where there are none.
using ActivationArguments = std::tuple<std::string, Address, float>;

Activation activation_of(const ActivationArguments& arguments) {
  const auto& [kind, slopes, slope] = arguments;
  return {activation_from_name(kind), pointer<float>(slopes), slope};
}

void def_norms(py::module_& m) {
  m.def(
      "norm_partials",
      [](const std::array<std::int64_t, 6>& shape, const std::string& dtype) {
        return norm_partials(norm_shape(shape), dtype_from_name(dtype));
      },
      py::arg("shape"), py::arg("dtype"));
  m.def(
      "channel_statistics_cuda",
      [](Address x, Address statistics, Address partials, const std::string& dtype,
         const std::array<std::int64_t, 6>& shape, Address stream) {
        channel_statistics_cuda(pointer<>(x), pointer<double>(statistics), pointer<float>(partials),
                                dtype_from_name(dtype), norm_shape(shape), pointer<>(stream));
      },
      py::arg("x"), py::arg("statistics"), py::arg("partials"), py::arg("dtype"), py::arg("shape"), py::arg("stream"));
  m.def(
      "scale_shift_cuda",
      [](Address x, const std::array<Address, 3>& norm, Address skip, Address out, const std::string& dtype,
         const std::array<std::int64_t, 6>& shape, const std::array<std::int64_t, 4>& skip_strides,
         const ActivationArguments& activation, Address stream) {
        scale_shift_cuda(pointer<>(x), norm_pointers(norm), pointer<>(skip), pointer<>(out), dtype_from_name(dtype),
                         norm_shape(shape), filled<ImageStrides>(skip_strides), activation_of(activation),
                         pointer<>(stream));
      },
      py::arg("x"), py::arg("norm"), py::arg("skip"), py::arg("out"), py::arg("dtype"), py::arg("shape"),
      py::arg("skip_strides"), py::arg("activation"), py::arg("stream"));
  m.def(
      "norm_from_statistics_cuda",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, const std::array<Address, 2>& parameters,
         double eps, Address norm, std::int64_t images, std::int64_t channels, Address stream) {
        norm_from_statistics_cuda(norm_statistics(statistics, count_step), norm_parameters(parameters, eps),
                                  pointer<float>(norm), images, channels, pointer<>(stream));
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("parameters"), py::arg("eps"), py::arg("norm"),
      py::arg("images"), py::arg("channels"), py::arg("stream"));
  m.def(
      "update_running_statistics_cuda",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, double share, Address mean,
         Address variance, std::int64_t channels, Address stream) {
        update_running_statistics_cuda(norm_statistics(statistics, count_step), share, pointer<float>(mean),
                                       pointer<float>(variance), channels, pointer<>(stream));
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("share"), py::arg("mean"), py::arg("variance"),
      py::arg("channels"), py::arg("stream"));
  m.def(
      "norm_gradient_sums_cuda",
      [](Address x, Address grad, const std::array<Address, 3>& norm, Address statistics, Address sums,
         Address partials, const std::string& dtype, const std::array<std::int64_t, 6>& shape,
         const ActivationArguments& activation, Address y, Address masked, Address stream) {
        norm_gradient_sums_cuda(pointer<>(x), pointer<>(grad), norm_pointers(norm), pointer<double>(statistics),
                                pointer<double>(sums), pointer<float>(partials), dtype_from_name(dtype),
                                norm_shape(shape), activation_of(activation), {pointer<>(y), pointer<>(masked)},
                                pointer<>(stream));
      },
      py::arg("x"), py::arg("grad"), py::arg("norm"), py::arg("statistics"), py::arg("sums"), py::arg("partials"),
      py::arg("dtype"), py::arg("shape"), py::arg("activation"), py::arg("y"), py::arg("masked"), py::arg("stream"));
  m.def(
      "norm_parameter_gradients_cuda",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, double eps, Address sums, std::int64_t rows,
         Address gradients, std::int64_t images, std::int64_t channels, Address stream) {
        norm_parameter_gradients_cuda(norm_statistics(statistics, count_step), eps, pointer<double>(sums), rows,
                                      pointer<float>(gradients), images, channels, pointer<>(stream));
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("eps"), py::arg("sums"), py::arg("rows"),
      py::arg("gradients"), py::arg("images"), py::arg("channels"), py::arg("stream"));
  m.def(
      "norm_gradient_factors_cuda",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, const std::array<Address, 2>& parameters,
         double eps, Address sums, std::int64_t rows, Address factors, std::int64_t images, std::int64_t channels,
         Address stream) {
        norm_gradient_factors_cuda(norm_statistics(statistics, count_step), norm_parameters(parameters, eps),
                                   pointer<double>(sums), rows, pointer<float>(factors), images, channels,
                                   pointer<>(stream));
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("parameters"), py::arg("eps"), py::arg("sums"),
      py::arg("rows"), py::arg("factors"), py::arg("images"), py::arg("channels"), py::arg("stream"));
  m.def(
      "norm_gradient_cuda",
      [](Address x, Address grad, const std::array<Address, 3>& norm, Address factors, Address out,
         const std::string& dtype, const std::array<std::int64_t, 6>& shape, const ActivationArguments& activation,
         Address stream) {
        norm_gradient_cuda(pointer<>(x), pointer<>(grad), norm_pointers(norm), pointer<float>(factors), pointer<>(out),
                           dtype_from_name(dtype), norm_shape(shape), activation_of(activation), pointer<>(stream));
      },
      py::arg("x"), py::arg("grad"), py::arg("norm"), py::arg("factors"), py::arg("out"), py::arg("dtype"),
      py::arg("shape"), py::arg("activation"), py::arg("stream"));
}

void def_images(py::module_& m) {
  m.def(
      "image_io_cuda",
      [](Address image, Address out, const std::string& image_dtype, const std::string& dtype, std::int64_t images,
         const std::array<std::int64_t, 6>& w, const std::array<std::int64_t, 4>& strides, float scale, float shift,
         Address stream) {
        image_io_cuda(pointer<>(image), pointer<>(out), image_dtype, dtype_from_name(dtype), images, filled<Window>(w),
                      filled<ImageStrides>(strides), scale, shift, pointer<>(stream));
      },
      py::arg("image"), py::arg("out"), py::arg("image_dtype"), py::arg("dtype"), py::arg("images"), py::arg("window"),
      py::arg("strides"), py::arg("scale"), py::arg("shift"), py::arg("stream"));
  m.def(
      "picture_cuda",
      [](Address y, Address bias, Address out, const std::string& dtype, const std::string& out_dtype,
         const std::string& output, const std::array<std::int64_t, 3>& shape,
         const std::array<std::int64_t, 4>& strides, const std::array<std::int64_t, 4>& out_strides, Address stream) {
        picture_cuda(pointer<>(y), pointer<float>(bias), pointer<>(out), dtype_from_name(dtype), out_dtype,
                     output_from_name(output), filled<PictureShape>(shape), filled<ImageStrides>(strides),
                     filled<ImageStrides>(out_strides), pointer<>(stream));
      },
      py::arg("y"), py::arg("bias"), py::arg("out"), py::arg("dtype"), py::arg("out_dtype"), py::arg("output"),
      py::arg("shape"), py::arg("strides"), py::arg("out_strides"), py::arg("stream"));
}

}  // namespace

void def_cuda_launchers(py::module_& m) {
  m.def(
      "tv_loss_partials",
      [](const std::array<std::int64_t, 5>& shape) { return tv_loss_partials(filled<RowShape>(shape)); },
      py::arg("shape"));
  m.def(
      "tv_loss_fwd_cuda",
      [](Address x, Address grad, Address loss, Address partials, const std::string& dtype, const std::string& norm,
         const std::array<std::int64_t, 5>& shape, const std::array<std::int64_t, 3>& x_strides,
         const std::array<std::int64_t, 3>& grad_strides, Address stream) {
        tv_loss_fwd_cuda(pointer<>(x), pointer<>(grad), pointer<>(loss), pointer<>(partials), dtype_from_name(dtype),
                         norm_from_name(norm), filled<RowShape>(shape), filled<RowStrides>(x_strides),
                         filled<RowStrides>(grad_strides), pointer<>(stream));
      },
      py::arg("x"), py::arg("grad"), py::arg("loss"), py::arg("partials"), py::arg("dtype"), py::arg("norm"),
      py::arg("shape"), py::arg("x_strides"), py::arg("grad_strides"), py::arg("stream"));
  def_norms(m);
  def_images(m);
}

}  // namespace fastperc
#endif
