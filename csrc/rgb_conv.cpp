// The last convolution on the CPU. Its three filters would leave most columns of a matrix product empty. So each
// horizontal tap of each filter becomes a column of the product: 27 columns for 9×9 filters. This file adds the nine
// shifted products of each pixel and converts the sums to a picture.
#include "rgb_conv.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr int filters = 3;

// acc [count, 3] = bias + the products of `count` pixels from x on. None of them reaches past the border.
template <typename T>
FASTPERC_INLINE void add_inner(const T* row, float* acc, const HeadShape& shape, const float* bias, std::int64_t x,
                               std::int64_t count) {
  const std::int64_t step = shape.kernel * filters;
  for (std::int64_t i = 0; i < count; ++i) {
    const T* product = row + (x + i - shape.left) * step;
    float sum[filters] = {bias[0], bias[1], bias[2]};
    for (std::int64_t dx = 0; dx < shape.kernel; ++dx, product += step + filters) {
      for (int o = 0; o < filters; ++o) sum[o] += widen(product[o]);
    }
    for (int o = 0; o < filters; ++o) acc[i * filters + o] = sum[o];
  }
}

// The same for one pixel near the border.
template <typename T>
void add_outer(const T* row, float* acc, const HeadShape& shape, const float* bias, std::int64_t x) {
  for (int o = 0; o < filters; ++o) acc[o] = bias[o];
  for (std::int64_t dx = 0; dx < shape.kernel; ++dx) {
    std::int64_t column = x - shape.left + dx;
    if (column < 0 || column >= shape.columns) {
      if (!shape.reflect) continue;
      column = reflected(column, shape.columns);
    }
    for (int o = 0; o < filters; ++o) acc[o] += widen(row[(column * shape.kernel + dx) * filters + o]);
  }
}

#define FASTPERC_HEAD(T)                                                                                   \
  FASTPERC_MULTIVERSION void head_row(const T* row, float* acc, const HeadShape& shape, const float* bias, \
                                      Output output) {                                                     \
    const std::int64_t first = std::clamp<std::int64_t>(shape.left, 0, shape.width);                       \
    const std::int64_t last =                                                                              \
        std::clamp<std::int64_t>(shape.columns + shape.left - shape.kernel + 1, first, shape.width);       \
    for (std::int64_t x = 0; x < first; ++x) add_outer(row, acc + x * filters, shape, bias, x);            \
    if (shape.kernel == 9) { /* a constant, so that the compiler unrolls */                                \
      HeadShape nine = shape;                                                                              \
      nine.kernel = 9;                                                                                     \
      add_inner(row, acc + first * filters, nine, bias, first, last - first);                              \
    } else {                                                                                               \
      add_inner(row, acc + first * filters, shape, bias, first, last - first);                             \
    }                                                                                                      \
    for (std::int64_t x = last; x < shape.width; ++x) add_outer(row, acc + x * filters, shape, bias, x);   \
    to_image_range(acc, shape.width * filters, output);                                                    \
  }
FASTPERC_HEAD(float)
FASTPERC_HEAD(BFloat16)

}  // namespace

void rgb_conv_head_cpu(const void* products, const float* bias, void* out, DType dtype, const std::string& out_dtype,
                       Output output, const HeadShape& shape, const ImageStrides& out_strides, int threads) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_pixels(out_dtype, [&](auto* out_type) {
      using Out = std::remove_pointer_t<decltype(out_type)>;
      parallel_for(shape.rows, threads, [&](std::int64_t y) {
        std::vector<float> acc(shape.width * filters);
        head_row(static_cast<const T*>(products) + y * shape.columns * shape.kernel * filters, acc.data(), shape, bias,
                 output);
        store_row(acc.data(), shape.width, static_cast<Out*>(out) + y * out_strides.row, out_strides);
      });
    });
  };
  if (dtype == DType::bfloat16) return run(static_cast<BFloat16*>(nullptr));
  if (dtype == DType::float32) return run(static_cast<float*>(nullptr));
  throw std::invalid_argument("fastperc: rgb_conv: products are float32 or bfloat16");
}

}  // namespace fastperc
