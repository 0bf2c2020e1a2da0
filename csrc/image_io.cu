// Images at the two ends of a network, on a GPU: into its input, as image_io.cpp does, and from the output of its last
// convolution. Each is one pass for every layout and dtype.
#include "device.cuh"
#include "image_io.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastperc {
namespace {

constexpr int channels = 3;
constexpr int threads_per_block = 256;

// A thread has `vec` adjacent elements of a row of the output, so that a warp stores adjacent memory.
template <typename From, typename To, int vec>
__global__ void __launch_bounds__(threads_per_block)
    image_io_kernel(const From* __restrict image_ptr,  // [images, 3, rows, columns], strided
                    To* __restrict out_ptr,            // [images, height, width, 3]
                    std::int64_t count,                // of threads that have elements
                    Window window, ImageStrides strides, float scale, float shift) {
  const std::int64_t thread = std::int64_t(blockIdx.x) * threads_per_block + threadIdx.x;
  if (thread >= count) return;
  const std::int64_t threads_of_row = window.width * channels / vec;
  const std::int64_t row = divided(thread, threads_of_row), image = divided(row, window.height);
  const std::int64_t y = reflected(window.top + row - image * window.height, window.rows);
  const From* from = image_ptr + image * strides.image + y * strides.row;
  const std::int64_t first = (thread - row * threads_of_row) * vec;
  Vector<To, vec> out;
#pragma unroll
  for (int j = 0; j < vec; ++j) {
    const std::int64_t column = divided(first + j, channels), channel = first + j - column * channels;
    const std::int64_t x = reflected(window.left + column, window.columns);
    const From value = from[x * strides.column + channel * strides.channel];
    narrow(to_input(static_cast<float>(widen(value)), scale, shift), out.at[j]);
  }
  store(out_ptr + thread * vec, out);
}

// A thread has a pixel.
template <typename From, typename To>
__global__ void __launch_bounds__(threads_per_block)
    picture_kernel(const From* __restrict y_ptr,      // [images, 3, rows, columns], strided
                   const float* __restrict bias_ptr,  // [3]
                   To* __restrict out_ptr,            // as y, with other strides
                   std::int64_t count,                // of pixels
                   std::int64_t rows, std::int64_t columns, ImageStrides strides, ImageStrides out_strides,
                   Output output) {
  const std::int64_t pixel = std::int64_t(blockIdx.x) * threads_per_block + threadIdx.x;
  if (pixel >= count) return;
  const std::int64_t line = divided(pixel, columns), column = pixel - line * columns;
  const std::int64_t image = divided(line, rows), row = line - image * rows;
  const auto offset = [&](const ImageStrides& s) { return image * s.image + row * s.row + column * s.column; };
  const From* from = y_ptr + offset(strides);
  To* to = out_ptr + offset(out_strides);
#pragma unroll
  for (int c = 0; c < channels; ++c) {
    const float value = widen(from[c * strides.channel]) + bias_ptr[c];
    narrow(to_image_range(value, output), to[c * out_strides.channel]);
  }
}

}  // namespace

void image_io_cuda(const void* image, void* out, const std::string& image_dtype, DType dtype, std::int64_t images,
                   const Window& window, const ImageStrides& strides, float scale, float shift, void* stream) {
  dispatch_pixels(image_dtype, [&](auto* from) {
    using From = std::remove_pointer_t<decltype(from)>;
    dispatch_narrow(dtype, [&](auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      constexpr int wide = vector_bytes / sizeof(To);
      const bool fits =
          window.width * channels % wide == 0 && reinterpret_cast<std::uintptr_t>(out) % vector_bytes == 0;
      const auto kernel = fits ? image_io_kernel<From, To, wide> : image_io_kernel<From, To, 1>;
      const std::int64_t count = images * window.height * window.width * channels / (fits ? wide : 1);
      launch("image_io", kernel, grid_size("image_io", ceil_div(count, threads_per_block)), threads_per_block, stream,
             static_cast<const From*>(image), static_cast<To*>(out), count, window, strides, scale, shift);
    });
  });
}

void picture_cuda(const void* y, const float* bias, void* out, DType dtype, const std::string& out_dtype, Output output,
                  const PictureShape& shape, const ImageStrides& strides, const ImageStrides& out_strides,
                  void* stream) {
  dispatch_narrow(dtype, [&](auto* from) {
    using From = std::remove_pointer_t<decltype(from)>;
    dispatch_pixels(out_dtype, [&](auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      const std::int64_t count = shape.images * shape.rows * shape.columns;
      launch("picture", picture_kernel<From, To>, grid_size("picture", ceil_div(count, threads_per_block)),
             threads_per_block, stream, static_cast<const From*>(y), bias, static_cast<To*>(out), count, shape.rows,
             shape.columns, strides, out_strides, output);
    });
  });
}

}  // namespace fastperc
