// The Python bindings of the convolutions of frozen networks: single calls, and calls that are prepared once.
#include <pybind11/stl.h>

#include "bindings.h"
#include "conv_series.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastperc {
namespace {

std::int64_t rows_of_kernel(const PointwiseShape& shape) { return (shape.kernel_rows - 1) * shape.dilation + 1; }
std::int64_t rows_of_kernel(const DepthwiseShape& shape) { return shape.kernel; }
std::int64_t rows_of_kernel(const StemShape& shape) { return shape.kernel; }

template <typename Shape>
PreparedConv geometry(const Shape& s, const ImageStrides& skip) {
  const std::int64_t row = s.columns * s.in_step, out_row = s.out_columns * s.out_step;
  return {nullptr,
          {s.images, s.rows, s.top, s.out_rows},
          rows_of_kernel(s),
          s.stride,
          row,
          out_row,
          skip.row,
          s.rows * row,
          s.out_rows * out_row,
          skip.image};
}

// Defines NAME_cpu, which runs the kernel, and prepare_NAME, which gives its PreparedConv. The shape is `size` numbers.
template <std::size_t size, typename Shape>
void def_conv(py::module_& m, const std::string& name,
              void (*kernel)(const float*, const float*, const float*, const float*, float*, const Shape&,
                             const ImageStrides&, const Activation&, int)) {
  const auto prepare = [=](Address weights, Address bias, const std::array<std::int64_t, size>& numbers,
                           const std::array<std::int64_t, 4>& skip_strides, const std::string& activation,
                           Address slopes) {
    const Activation function{activation_from_name(activation), pointer<float>(slopes)};
    const Shape shape = filled<Shape>(numbers);
    const ImageStrides strides = filled<ImageStrides>(skip_strides);
    PreparedConv conv = geometry(shape, strides);
    conv.run = [=, w = pointer<float>(weights), b = pointer<float>(bias)](const float* x, const float* skip, float* out,
                                                                          const Strip& strip, int threads) {
      Shape part = shape;
      part.images = strip.images, part.rows = strip.rows, part.top = strip.top, part.out_rows = strip.out_rows;
      kernel(x, w, b, skip, out, part, strides, function, threads);
    };
    return conv;
  };
  m.def(("prepare_" + name).c_str(), prepare, py::arg("weights"), py::arg("bias"), py::arg("shape"),
        py::arg("skip_strides"), py::arg("activation"), py::arg("slopes"));
  m.def((name + "_cpu").c_str(),
        [=](Address x, Address weights, Address bias, Address skip, Address out,
            const std::array<std::int64_t, size>& numbers, const std::array<std::int64_t, 4>& skip_strides,
            const std::string& activation, Address slopes, int threads) {
          const PreparedConv conv = prepare(weights, bias, numbers, skip_strides, activation, slopes);
          py::gil_scoped_release release;
          conv.run(pointer<float>(x), pointer<float>(skip), pointer<float>(out), conv.whole, threads);
        },
        py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("skip"), py::arg("out"), py::arg("shape"),
        py::arg("skip_strides"), py::arg("activation"), py::arg("slopes"), py::arg("threads"));
}

}  // namespace

void def_prepared_convs(py::module_& m) {
  py::class_<PreparedConv>(m, "PreparedConv")
      .def(
          "__call__",
          [](const PreparedConv& conv, Address x, Address skip, Address out, int threads) {
            py::gil_scoped_release release;
            conv.run(pointer<float>(x), pointer<float>(skip), pointer<float>(out), conv.whole, threads);
          },
          py::arg("x"), py::arg("skip"), py::arg("out"), py::arg("threads"));
  // The layers: each with the numbers of its x, skip and out.
  py::class_<ConvSeries>(m, "ConvSeries")
      .def(py::init([](const std::vector<std::pair<const PreparedConv*, std::array<std::int64_t, 3>>>& layers,
                       std::vector<std::int64_t> offsets) {
             std::vector<SeriesLayer> series;
             for (const auto& [conv, maps] : layers) series.push_back({*conv, maps[0], maps[1], maps[2]});
             return ConvSeries(std::move(series), std::move(offsets));
           }),
           py::arg("layers"), py::arg("offsets"))
      .def(
          "__call__",
          [](const ConvSeries& series, const std::vector<Address>& maps, Address memory, int threads) {
            std::vector<float*> pointers;
            for (const Address map : maps) pointers.push_back(pointer<float>(map));
            py::gil_scoped_release release;
            series.run(std::move(pointers), pointer<float>(memory), threads);
          },
          py::arg("maps"), py::arg("memory"), py::arg("threads"));
  def_conv<15>(m, "pointwise_conv", pointwise_conv_cpu);
  def_conv<12>(m, "depthwise_conv", depthwise_conv_cpu);
  def_conv<13>(m, "stem_conv", stem_conv_cpu);
}

}  // namespace fastperc
