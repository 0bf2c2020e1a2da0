// The Python bindings of the compiled module. Addresses are passed as integers. fastperc/_native is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastperc;

namespace {

RGBConvShape rgb_conv_shape(const std::array<std::int64_t, 9>& s, bool reflect) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], reflect};
}

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

  // Makes malloc serve blocks of up to `block` bytes from freed memory, of which the process keeps up to `kept` bytes.
  // By default glibc asks the system for large blocks every time, page by page. Other C libraries are left as they are.
  m.def(
      "reuse_freed_memory",
      []([[maybe_unused]] int block, [[maybe_unused]] int kept) {
#ifdef __GLIBC__
        mallopt(M_MMAP_THRESHOLD, block);
        mallopt(M_TRIM_THRESHOLD, kept);
#endif
      },
      py::arg("block"), py::arg("kept"));

  m.def(
      "tv_loss_fwd_cpu",
      [](Address x, Address grad, Address loss, const std::string& dtype, const std::string& norm,
         const std::array<std::int64_t, 5>& shape, const std::array<std::int64_t, 3>& x_strides,
         const std::array<std::int64_t, 3>& grad_strides, int threads) {
        const DType type = dtype_from_name(dtype);
        const Norm kind = norm_from_name(norm);
        py::gil_scoped_release release;
        tv_loss_fwd_cpu(pointer<>(x), pointer<>(grad), pointer<>(loss), type, kind, filled<RowShape>(shape),
                        filled<RowStrides>(x_strides), filled<RowStrides>(grad_strides), threads);
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
        relu_pool_fwd_cpu(pointer<>(x), pointer<>(pooled), pointer<>(winners), type, filled<ImageShape>(shape),
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
        relu_pool_bwd_cpu(pointer<>(grad_pooled), pointer<>(winners), pointer<>(grad), type, filled<ImageShape>(shape),
                          threads);
      },
      py::arg("grad_pooled"), py::arg("winners"), py::arg("grad"), py::arg("dtype"), py::arg("shape"),
      py::arg("threads"));

  // Pointers: the features of both sides, weight, incoming, distances, gradients and inverses of both sides. Strides:
  // of the features of both sides, and of the gradients.
  m.def(
      "lpips_distance_cpu",
      [](const std::array<Address, 9>& p, const std::array<std::array<std::int64_t, 3>, 4>& strides, bool after_relu,
         const std::string& dtype, const std::array<std::int64_t, 3>& shape, int threads) {
        const LpipsTensors tensors{{pointer<>(p[0]), pointer<>(p[1])},
                                   {filled<FeatureStrides>(strides[0]), filled<FeatureStrides>(strides[1])},
                                   pointer<>(p[2]),
                                   pointer<>(p[3]),
                                   pointer<>(p[4]),
                                   {pointer<>(p[5]), pointer<>(p[6])},
                                   {filled<FeatureStrides>(strides[2]), filled<FeatureStrides>(strides[3])},
                                   {pointer<>(p[7]), pointer<>(p[8])},
                                   after_relu};
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        lpips_distance_cpu(tensors, type, {shape[0], shape[1], shape[2]}, threads);
      },
      py::arg("pointers"), py::arg("strides"), py::arg("after_relu"), py::arg("dtype"), py::arg("shape"),
      py::arg("threads"));

  m.def(
      "image_io_cpu",
      [](Address image, Address out, const std::string& image_dtype, const std::string& dtype, std::int64_t images,
         const std::array<std::int64_t, 6>& w, const std::array<std::int64_t, 4>& strides, float scale, float shift,
         int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        image_io_cpu(pointer<>(image), pointer<>(out), image_dtype, type, images, {w[0], w[1], w[2], w[3], w[4], w[5]},
                     filled<ImageStrides>(strides), scale, shift, threads);
      },
      py::arg("image"), py::arg("out"), py::arg("image_dtype"), py::arg("dtype"), py::arg("images"), py::arg("window"),
      py::arg("strides"), py::arg("scale"), py::arg("shift"), py::arg("threads"));
  m.def(
      "rgb_conv_head_cpu",
      [](Address products, Address bias, Address out, const std::string& dtype, const std::string& out_dtype,
         const std::string& output, const std::array<std::int64_t, 5>& s, bool reflect,
         const std::array<std::int64_t, 4>& out_strides, int threads) {
        const DType type = dtype_from_name(dtype);
        const Output kind = output_from_name(output);
        py::gil_scoped_release release;
        rgb_conv_head_cpu(pointer<>(products), pointer<float>(bias), pointer<>(out), type, out_dtype, kind,
                          {s[0], s[1], s[2], s[3], s[4], reflect}, filled<ImageStrides>(out_strides), threads);
      },
      py::arg("products"), py::arg("bias"), py::arg("out"), py::arg("dtype"), py::arg("out_dtype"), py::arg("output"),
      py::arg("shape"), py::arg("reflect"), py::arg("out_strides"), py::arg("threads"));
  m.def(
      "rgb_conv_stem_winograd_cpu",
      [](Address x, Address weights, Address bias, Address out, const std::array<std::int64_t, 9>& shape, bool reflect,
         bool relu, int threads) {
        py::gil_scoped_release release;
        rgb_conv_stem_winograd_cpu(pointer<float>(x), pointer<float>(weights), pointer<float>(bias),
                                   pointer<float>(out), rgb_conv_shape(shape, reflect), relu, threads);
      },
      py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("out"), py::arg("shape"), py::arg("reflect"),
      py::arg("relu"), py::arg("threads"));
  m.def(
      "rgb_conv_head_winograd_cpu",
      [](Address x, Address weights, Address bias, Address out, const std::string& out_dtype, const std::string& output,
         const std::array<std::int64_t, 9>& shape, bool reflect, const std::array<std::int64_t, 4>& out_strides,
         int threads) {
        const Output kind = output_from_name(output);
        py::gil_scoped_release release;
        rgb_conv_head_winograd_cpu(pointer<float>(x), pointer<float>(weights), pointer<float>(bias), pointer<>(out),
                                   out_dtype, kind, rgb_conv_shape(shape, reflect), filled<ImageStrides>(out_strides),
                                   threads);
      },
      py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("out"), py::arg("out_dtype"), py::arg("output"),
      py::arg("shape"), py::arg("reflect"), py::arg("out_strides"), py::arg("threads"));
  m.def(
      "channel_statistics_cpu",
      [](Address x, Address statistics, const std::string& dtype, const std::array<std::int64_t, 4>& shape,
         int threads) {
        const DType type = dtype_from_name(dtype);
        py::gil_scoped_release release;
        channel_statistics_cpu(pointer<>(x), pointer<double>(statistics), type, filled<ImageShape>(shape), threads);
      },
      py::arg("x"), py::arg("statistics"), py::arg("dtype"), py::arg("shape"), py::arg("threads"));
  m.def(
      "scale_shift_cpu",
      [](Address x, Address scale, Address shift, Address skip, Address out, const std::string& dtype,
         const std::array<std::int64_t, 4>& shape, const std::array<std::int64_t, 4>& skip_strides,
         const std::string& activation, Address slopes, int threads) {
        const DType type = dtype_from_name(dtype);
        const Activation function{activation_from_name(activation), pointer<float>(slopes)};
        py::gil_scoped_release release;
        scale_shift_cpu(pointer<>(x), pointer<float>(scale), pointer<float>(shift), pointer<>(skip), pointer<>(out),
                        type, filled<ImageShape>(shape), filled<ImageStrides>(skip_strides), function, threads);
      },
      py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("skip"), py::arg("out"), py::arg("dtype"),
      py::arg("shape"), py::arg("skip_strides"), py::arg("activation"), py::arg("slopes"), py::arg("threads"));
  m.def(
      "norm_from_statistics_cpu",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, const std::array<Address, 2>& parameters,
         double eps, Address norm, std::int64_t images, std::int64_t channels) {
        norm_from_statistics_cpu(norm_statistics(statistics, count_step), norm_parameters(parameters, eps),
                                 pointer<float>(norm), images, channels);
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("parameters"), py::arg("eps"), py::arg("norm"),
      py::arg("images"), py::arg("channels"));
  m.def(
      "update_running_statistics_cpu",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, double share, Address mean,
         Address variance, std::int64_t channels) {
        update_running_statistics_cpu(norm_statistics(statistics, count_step), share, pointer<float>(mean),
                                      pointer<float>(variance), channels);
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("share"), py::arg("mean"), py::arg("variance"),
      py::arg("channels"));
  m.def(
      "norm_parameter_gradients_cpu",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, double eps, Address sums, std::int64_t rows,
         Address gradients, std::int64_t images, std::int64_t channels) {
        norm_parameter_gradients_cpu(norm_statistics(statistics, count_step), eps, pointer<double>(sums), rows,
                                     pointer<float>(gradients), images, channels);
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("eps"), py::arg("sums"), py::arg("rows"),
      py::arg("gradients"), py::arg("images"), py::arg("channels"));
  m.def(
      "norm_gradient_factors_cpu",
      [](const std::array<Address, 2>& statistics, std::int64_t count_step, const std::array<Address, 2>& parameters,
         double eps, Address sums, std::int64_t rows, Address factors, std::int64_t images, std::int64_t channels) {
        norm_gradient_factors_cpu(norm_statistics(statistics, count_step), norm_parameters(parameters, eps),
                                  pointer<double>(sums), rows, pointer<float>(factors), images, channels);
      },
      py::arg("statistics"), py::arg("count_step"), py::arg("parameters"), py::arg("eps"), py::arg("sums"),
      py::arg("rows"), py::arg("factors"), py::arg("images"), py::arg("channels"));
  m.def(
      "norm_gradient_sums_cpu",
      [](Address x, Address grad, const std::array<Address, 3>& norm, Address statistics, Address sums,
         const std::string& dtype, const std::array<std::int64_t, 4>& shape, const std::string& activation,
         Address slopes, Address y, Address masked, int threads) {
        const DType type = dtype_from_name(dtype);
        const Activation function{activation_from_name(activation), pointer<float>(slopes)};
        py::gil_scoped_release release;
        norm_gradient_sums_cpu(pointer<>(x), pointer<>(grad), norm_pointers(norm), pointer<double>(statistics),
                               pointer<double>(sums), type, filled<ImageShape>(shape), function,
                               {pointer<>(y), pointer<>(masked)}, threads);
      },
      py::arg("x"), py::arg("grad"), py::arg("norm"), py::arg("statistics"), py::arg("sums"), py::arg("dtype"),
      py::arg("shape"), py::arg("activation"), py::arg("slopes"), py::arg("y"), py::arg("masked"), py::arg("threads"));
  m.def(
      "norm_gradient_cpu",
      [](Address x, Address grad, const std::array<Address, 3>& norm, Address factors, Address out,
         const std::string& dtype, const std::array<std::int64_t, 4>& shape, const std::string& activation,
         Address slopes, int threads) {
        const DType type = dtype_from_name(dtype);
        const Activation function{activation_from_name(activation), pointer<float>(slopes)};
        py::gil_scoped_release release;
        norm_gradient_cpu(pointer<>(x), pointer<>(grad), norm_pointers(norm), pointer<float>(factors), pointer<>(out),
                          type, filled<ImageShape>(shape), function, threads);
      },
      py::arg("x"), py::arg("grad"), py::arg("norm"), py::arg("factors"), py::arg("out"), py::arg("dtype"),
      py::arg("shape"), py::arg("activation"), py::arg("slopes"), py::arg("threads"));

  m.def("winograd_lanes", &winograd_lanes);
  m.def(
      "winograd_weights_cpu",
      [](Address weight, Address transformed, std::int64_t in, std::int64_t out,
         const std::array<std::int64_t, 4>& strides, std::int64_t tile, int threads) {
        py::gil_scoped_release release;
        winograd_weights_cpu(pointer<float>(weight), pointer<float>(transformed), in, out,
                             filled<WeightStrides>(strides), tile, threads);
      },
      py::arg("weight"), py::arg("transformed"), py::arg("in_channels"), py::arg("out_channels"), py::arg("strides"),
      py::arg("tile"), py::arg("threads"));
  m.def(
      "winograd_conv_cpu",
      [](Address x, Address weights, Address bias, Address skip, Address out, const std::array<std::int64_t, 9>& shape,
         const std::array<std::int64_t, 4>& skip_strides, const std::string& activation, Address slopes, int threads) {
        const Activation function{activation_from_name(activation), pointer<float>(slopes)};
        py::gil_scoped_release release;
        winograd_conv_cpu(pointer<float>(x), pointer<float>(weights), pointer<float>(bias), pointer<float>(skip),
                          pointer<float>(out), filled<WinogradShape>(shape), filled<ImageStrides>(skip_strides),
                          function, threads);
      },
      py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("skip"), py::arg("out"), py::arg("shape"),
      py::arg("skip_strides"), py::arg("activation"), py::arg("slopes"), py::arg("threads"));
  m.def(
      "winograd_weight_gradient_cpu",
      [](Address x, Address grad, Address weight, Address bias, const std::array<std::int64_t, 9>& shape,
         const std::array<std::int64_t, 4>& strides, int threads) {
        py::gil_scoped_release release;
        winograd_weight_gradient_cpu(pointer<float>(x), pointer<float>(grad), pointer<float>(weight),
                                     pointer<float>(bias), filled<WinogradShape>(shape), filled<WeightStrides>(strides),
                                     threads);
      },
      py::arg("x"), py::arg("grad"), py::arg("weight"), py::arg("bias"), py::arg("shape"), py::arg("strides"),
      py::arg("threads"));

  def_prepared_convs(m);
  m.def("pointwise_panels", [] {
    const PointwisePanels panels = pointwise_panels();
    return py::make_tuple(panels.lanes, panels.vectors);
  });

#ifdef FASTPERC_CUDA
  def_cuda_launchers(m);
#endif
}
