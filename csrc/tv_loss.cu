// Total variation on a GPU: loss and gradient in one pass, repeatable to the bit (no atomics).
//
// A thread walks down `rows_per_thread` rows of one column, so that each row is read from memory once: the row below
// becomes the centre, the centre the row above. Left and right neighbours are a neighbouring thread's centre and come
// from L1. Each block leaves one partial sum; a second kernel adds them up in a fixed order.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace fastperc {
namespace {

constexpr int threads_per_block = 256;
constexpr int rows_per_thread = 8;
constexpr int warp = 32;

__host__ __device__ std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The sum of `value` over the block, in thread 0. The same tree every time.
template <typename A>
__device__ A block_sum(A value) {
  __shared__ A warp_sums[threads_per_block / warp];
  for (int offset = warp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % warp == 0) warp_sums[threadIdx.x / warp] = value;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < threads_per_block / warp; ++i) sum += warp_sums[i];
  }
  return sum;
}

template <typename T, typename A, Norm norm, bool with_grad>
__global__ void __launch_bounds__(threads_per_block)
    tv_loss_kernel(const T* __restrict x_ptr,   // [outer, inner, rows, length], strided
                   T* __restrict grad_ptr,      // the same, or null
                   A* __restrict partials_ptr,  // [gridDim.x]
                   RowShape shape, RowStrides x_strides, RowStrides grad_strides) {
  const std::int64_t columns = ceil_div(shape.length, threads_per_block);
  const std::int64_t bands = ceil_div(shape.rows, rows_per_thread);
  const std::int64_t plane = blockIdx.x / (columns * bands);
  const std::int64_t band = blockIdx.x / columns % bands;
  const std::int64_t i = blockIdx.x % columns * threads_per_block + threadIdx.x;

  A acc = 0;
  if (i < shape.length) {
    const std::int64_t image = plane / shape.inner, channel = plane % shape.inner;
    const std::int64_t first = band * rows_per_thread;
    const std::int64_t last = min(first + rows_per_thread, shape.rows);
    const std::int64_t left = i >= shape.step ? -shape.step : 0;
    const std::int64_t right = i + shape.step < shape.length ? shape.step : 0;

    const T* x = x_ptr + image * x_strides.outer + channel * x_strides.inner + first * x_strides.row + i;
    T* grad = with_grad
                  ? grad_ptr + image * grad_strides.outer + channel * grad_strides.inner + first * grad_strides.row + i
                  : nullptr;
    A centre = widen(x[0]);
    A above = first > 0 ? widen(x[-x_strides.row]) : centre;
#pragma unroll
    for (int k = 0; k < rows_per_thread; ++k) {
      const std::int64_t r = first + k;
      if (r < last) {
        const A below = r + 1 < shape.rows ? widen(x[x_strides.row]) : centre;
        const A to_right = widen(x[right]);
        acc += pixel_loss<norm, A>(centre, to_right, below);
        if (with_grad) {
          narrow(pixel_grad<norm, A>(centre, widen(x[left]), to_right, above, below), *grad);
          grad += grad_strides.row;
        }
        above = centre;
        centre = below;
        x += x_strides.row;
      }
    }
  }
  const A sum = block_sum(acc);
  if (threadIdx.x == 0) partials_ptr[blockIdx.x] = sum;
}

template <typename A>
__global__ void __launch_bounds__(threads_per_block) sum_partials_kernel(const A* __restrict partials_ptr,  // [count]
                                                                         A* __restrict loss_ptr,            // [1]
                                                                         std::int64_t count) {
  double acc = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += threads_per_block) acc += partials_ptr[i];
  const double sum = block_sum(acc);
  if (threadIdx.x == 0) *loss_ptr = static_cast<A>(sum);
}

template <typename T, Norm norm>
void run(const void* x, void* grad, void* loss, void* partials, const RowShape& shape, const RowStrides& x_strides,
         const RowStrides& grad_strides, void* stream) {
  using A = Accumulator<T>;
  const std::int64_t blocks = tv_loss_partials(shape);
  if (blocks > 0) {
    const auto kernel = grad ? tv_loss_kernel<T, A, norm, true> : tv_loss_kernel<T, A, norm, false>;
    launch("tv_loss", kernel, static_cast<unsigned>(blocks), threads_per_block, stream, static_cast<const T*>(x),
           static_cast<T*>(grad), static_cast<A*>(partials), shape, x_strides, grad_strides);
  }
  launch("sum_partials", sum_partials_kernel<A>, 1u, threads_per_block, stream, static_cast<const A*>(partials),
         static_cast<A*>(loss), blocks);
}

}  // namespace

std::int64_t tv_loss_partials(const RowShape& shape) {
  return shape.outer * shape.inner * ceil_div(shape.rows, rows_per_thread) * ceil_div(shape.length, threads_per_block);
}

void tv_loss_fwd_cuda(const void* x, void* grad, void* loss, void* partials, DType dtype, Norm norm,
                      const RowShape& shape, const RowStrides& x_strides, const RowStrides& grad_strides,
                      void* stream) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run_norm = norm == Norm::l2 ? run<T, Norm::l2> : run<T, Norm::l1>;
    run_norm(x, grad, loss, partials, shape, x_strides, grad_strides, stream);
  });
}

}  // namespace fastperc
