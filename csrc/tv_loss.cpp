// Total variation on the CPU: loss and gradient in one pass over the rows.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

// Enough elements to be worth a thread.
constexpr std::int64_t elements_per_task = 1 << 17;

// The number of partial sums. It is large enough to hide the latency of additions, and does not depend on the width of
// the processor's vectors, so that the order of summation is the same everywhere.
constexpr std::int64_t lanes = 64;

// Adds the loss of `count` elements of a row, at most `lanes`, to acc [lanes], and writes their gradient if asked. The
// neighbours to the left and right are `left` and `right` elements away.
template <Norm norm, bool with_grad, typename T, typename A>
FASTPERC_INLINE void chunk(const T* __restrict x, const T* __restrict above, const T* __restrict below,
                           T* __restrict grad, A* __restrict acc, std::int64_t count, std::int64_t left,
                           std::int64_t right) {
  for (std::int64_t k = 0; k < count; ++k) {
    const A centre = widen(x[k]), right_pixel = widen(x[k + right]), pixel_below = widen(below[k]);
    acc[k] += pixel_loss<norm, A>(centre, right_pixel, pixel_below);
    if (with_grad) {
      narrow(pixel_grad<norm, A>(centre, widen(x[k - left]), right_pixel, widen(above[k]), pixel_below), grad[k]);
    }
  }
}

// Elements [begin, end) of a row, in chunks.
template <Norm norm, bool with_grad, typename T, typename A>
FASTPERC_INLINE void span(const T* x, const T* above, const T* below, T* grad, A* acc, std::int64_t begin,
                          std::int64_t end, std::int64_t left, std::int64_t right) {
  std::int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {  // of a constant length, which compilers vectorise
    chunk<norm, with_grad>(x + i, above + i, below + i, grad + i, acc, lanes, left, right);
  }
  if (i < end) chunk<norm, with_grad>(x + i, above + i, below + i, grad + i, acc, end - i, left, right);
}

// The loss of rows [begin, end), counted over all images and channels. The sums over rows are kept in double.
template <Norm norm, bool with_grad, typename T>
FASTPERC_INLINE double rows(const T* x, T* grad, const RowShape& shape, const RowStrides& xs, const RowStrides& gs,
                            std::int64_t begin, std::int64_t end) {
  double sums[lanes] = {};
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t plane = i / shape.rows, r = i % shape.rows;
    const std::int64_t image = plane / shape.inner, channel = plane % shape.inner;
    const T* current = x + image * xs.outer + channel * xs.inner + r * xs.row;
    // At the border the row itself replaces the missing row.
    const T* above = r > 0 ? current - xs.row : current;
    const T* below = r + 1 < shape.rows ? current + xs.row : current;
    T* out = with_grad ? grad + image * gs.outer + channel * gs.inner + r * gs.row : nullptr;
    Accumulator<T> acc[lanes] = {};
    // The first pixel of a row has no left neighbour and the last no right one: the pixel itself replaces it.
    const std::int64_t first = shape.step, last = shape.length - shape.step;
    span<norm, with_grad>(current, above, below, out, acc, 0, first, 0, last > 0 ? shape.step : 0);
    span<norm, with_grad>(current, above, below, out, acc, first, last, shape.step, shape.step);
    if (last > 0) span<norm, with_grad>(current, above, below, out, acc, last, shape.length, shape.step, 0);
    for (std::int64_t k = 0; k < lanes; ++k) sums[k] += acc[k];
  }
  double loss = 0;
  for (const double sum : sums) loss += sum;
  return loss;
}

// One plain function for each dtype, since templates cannot be compiled for several instruction sets. grad may be null.
#define FASTPERC_ROWS(T)                                                                                         \
  FASTPERC_MULTIVERSION double rows(Norm norm, const T* x, T* grad, const RowShape& shape, const RowStrides& xs, \
                                    const RowStrides& gs, std::int64_t begin, std::int64_t end) {                \
    if (norm == Norm::l2) {                                                                                      \
      return grad ? rows<Norm::l2, true>(x, grad, shape, xs, gs, begin, end)                                     \
                  : rows<Norm::l2, false>(x, grad, shape, xs, gs, begin, end);                                   \
    }                                                                                                            \
    return grad ? rows<Norm::l1, true>(x, grad, shape, xs, gs, begin, end)                                       \
                : rows<Norm::l1, false>(x, grad, shape, xs, gs, begin, end);                                     \
  }
FASTPERC_ROWS(float)
FASTPERC_ROWS(double)
FASTPERC_ROWS(Half)
FASTPERC_ROWS(BFloat16)

}  // namespace

void tv_loss_fwd_cpu(const void* x, void* grad, void* loss, DType dtype, Norm norm, const RowShape& shape,
                     const RowStrides& x_strides, const RowStrides& grad_strides, int threads) {
  // Tasks depend on the shape alone and are added up in order, so that the number of threads does not change the sum.
  const std::int64_t total = shape.outer * shape.inner * shape.rows;
  const std::int64_t per_task = std::max<std::int64_t>(elements_per_task / std::max<std::int64_t>(shape.length, 1), 1);
  std::vector<double> partials((total + per_task - 1) / per_task);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(static_cast<std::int64_t>(partials.size()), threads, [&](std::int64_t task) {
      const std::int64_t begin = task * per_task, end = std::min(begin + per_task, total);
      partials[task] =
          rows(norm, static_cast<const T*>(x), static_cast<T*>(grad), shape, x_strides, grad_strides, begin, end);
    });
    double sum = 0;
    for (const double partial : partials) sum += partial;
    *static_cast<Accumulator<T>*>(loss) = static_cast<Accumulator<T>>(sum);
  });
}

}  // namespace fastperc
