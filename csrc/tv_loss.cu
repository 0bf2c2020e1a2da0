// Total variation on a GPU: loss and gradient in one pass, bitwise repeatable (no atomics).
//
// A warp takes a tile of 32 vectors by `tile_rows` rows, and a thread takes one column of the tile. Vectors have 16
// bytes where pointers, strides and length allow, else one element. A thread loads its whole column before it computes,
// to hide the latency of memory. The warps of a block take tiles that lie below each other. So the rows that tiles
// share, and the neighbours to the left and right, come from the L1 cache, and memory is read once. Each block writes
// one partial sum. A second kernel adds the partial sums in a fixed order.
#include <algorithm>
#include <limits>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fastperc {
namespace {

constexpr int threads_per_block = 256;
constexpr int warps_per_block = threads_per_block / warp;
constexpr int tile_rows = 4;
constexpr int sum_threads = 1024;

// The tiles of an image, numbered downwards first, then across, then by plane. The kernel counts in 32 bits, except for
// offsets, because a 64-bit division takes as long as a row.
struct Tiling {
  unsigned down, across, count;
  Tiling(const RowShape& shape, int vec) {
    const std::int64_t rows = ceil_div(shape.rows, tile_rows), columns = ceil_div(shape.length, warp * vec);
    const std::int64_t tiles = shape.outer * shape.inner * rows * columns;
    constexpr std::int64_t limit = std::numeric_limits<int>::max() - 1024;  // how far a tile may reach past the border
    if (std::max({shape.rows, shape.length, tiles}) > limit) {
      throw std::invalid_argument(
          "fastperc: tv_loss: the image has more rows, columns or tiles than 32 bits can count");
    }
    down = static_cast<unsigned>(rows);
    across = static_cast<unsigned>(columns);
    count = static_cast<unsigned>(tiles);
  }
  unsigned blocks() const { return static_cast<unsigned>(ceil_div(count, warps_per_block)); }
};

// The launch bounds leave enough registers to load a whole column before the first use.
// vec: the elements of a vector. step: the step of the shape if it is less than vec. Other steps pass 0 and vec = 1.
template <typename T, int vec, int step, Norm norm, bool with_grad>
__global__ void __launch_bounds__(threads_per_block, step > 1 ? 2 : 3)
    tv_loss_kernel(const T* __restrict x_ptr,                // [outer, inner, rows, length], strided
                   T* __restrict grad_ptr,                   // the same, or null
                   Accumulator<T>* __restrict partials_ptr,  // [gridDim.x]
                   RowShape shape, RowStrides x_strides, RowStrides grad_strides, Tiling tiles) {
  static_assert(step > 0 ? step < vec : vec == 1, "a neighbour is in the same vector or in an adjacent one");
  using A = Accumulator<T>;
  const int rows = static_cast<int>(shape.rows), length = static_cast<int>(shape.length);
  const unsigned tile = blockIdx.x * warps_per_block + threadIdx.x / warp;
  const unsigned column = tile / tiles.down, plane = column / tiles.across;
  const int first = static_cast<int>(tile % tiles.down) * tile_rows;
  const int i = static_cast<int>(column % tiles.across * warp + threadIdx.x % warp) * vec;

  A acc = 0;
  if (tile < tiles.count && i < length) {
    const unsigned inner = static_cast<unsigned>(shape.inner), image = plane / inner, channel = plane % inner;
    const T* x = x_ptr + image * x_strides.outer + channel * x_strides.inner + first * x_strides.row + i;
    T* grad = with_grad
                  ? grad_ptr + image * grad_strides.outer + channel * grad_strides.inner + first * grad_strides.row + i
                  : nullptr;

    // A neighbour is `reach` elements further in the same vector, or in what is loaded from `to_left` elements before
    // the vector or `to_right` elements after it. More than one element is loaded as a whole vector, which is aligned.
    constexpr int reach = step > 0 ? step : 1;
    constexpr int side = step > 1 ? vec : 1;
    const int to_left = step > 0 ? side : static_cast<int>(shape.step);
    const int to_right = step > 0 ? vec : static_cast<int>(shape.step);
    const bool has_left = i >= to_left, has_right = i < length - to_right;

    // Computes `count` rows from x on. The row above is `to_above` elements from the first row, the row below is
    // `to_below` elements from the last. At the border these are 0: the row itself replaces the missing one.
    const auto walk = [&](auto count, std::int64_t to_above, std::int64_t to_below) {
      constexpr int n = decltype(count)::value;
      const Vector<T, vec> row_above = load<vec>(x + to_above);
      Vector<T, vec> row[n + 1];
      Vector<T, side> left_side[n], right_side[n];
#pragma unroll
      for (int k = 0; k < n; ++k) {
        row[k] = load<vec>(x);
        if (with_grad && has_left) left_side[k] = load<side>(x - to_left);
        if (has_right) right_side[k] = load<side>(x + to_right);
        x += k + 1 < n ? x_strides.row : to_below;
      }
      row[n] = load<vec>(x);

      A centre[vec], above[vec];  // the current row, and its slopes from the row above
#pragma unroll
      for (int j = 0; j < vec; ++j) {
        centre[j] = widen(row[0].at[j]);
        above[j] = slope<norm>(centre[j] - widen(row_above.at[j]));
      }
#pragma unroll
      for (int k = 0; k < n; ++k) {
        A next[vec], right[vec], below[vec];  // the next row, and the slopes to the right and down
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          A neighbour = centre[j];
          if (j + reach < vec) {
            neighbour = centre[j + reach];
          } else if (has_right) {
            neighbour = widen(right_side[k].at[j + reach - vec]);
          }
          next[j] = widen(row[k + 1].at[j]);
          acc += variation<norm>(neighbour - centre[j]);
          acc += variation<norm>(next[j] - centre[j]);
          right[j] = slope<norm>(neighbour - centre[j]);
          below[j] = slope<norm>(next[j] - centre[j]);
        }
        if (with_grad) {
          Vector<T, vec> out;
#pragma unroll
          for (int j = 0; j < vec; ++j) {
            A left = 0;
            if (j >= reach) {
              left = right[j - reach];
            } else if (has_left) {
              left = slope<norm>(centre[j] - widen(left_side[k].at[j + side - reach]));
            }
            narrow(pixel_grad<norm>(left, right[j], above[j], below[j]), out.at[j]);
          }
          store(grad, out);
          grad += grad_strides.row;
        }
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          centre[j] = next[j];
          above[j] = below[j];
        }
      }
    };
    const std::int64_t row = x_strides.row;
    if (first + tile_rows <= rows) {
      walk(std::integral_constant<int, tile_rows>(), first > 0 ? -row : 0, first + tile_rows < rows ? row : 0);
    } else {
#pragma unroll 1
      for (int r = first; r < rows; ++r)
        walk(std::integral_constant<int, 1>(), r > 0 ? -row : 0, r + 1 < rows ? row : 0);
    }
  }
  const A sum = block_sum<threads_per_block>(acc);
  if (threadIdx.x == 0) partials_ptr[blockIdx.x] = sum;
}

template <typename A>
__global__ void __launch_bounds__(sum_threads) sum_partials_kernel(const A* __restrict partials_ptr,  // [count]
                                                                   A* __restrict loss_ptr,            // [1]
                                                                   int count) {
  double acc = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += sum_threads) acc += partials_ptr[i];
  const double sum = block_sum<sum_threads>(acc);
  if (threadIdx.x == 0) *loss_ptr = static_cast<A>(sum);
}

// Whether every row of `data` can be read and written in vectors of 16 bytes.
template <typename T>
bool vectors_fit(const void* data, const RowShape& shape, const RowStrides& strides) {
  constexpr std::int64_t vec = vector_bytes / sizeof(T);
  return reinterpret_cast<std::uintptr_t>(data) % vector_bytes == 0 && shape.length % vec == 0 &&
         (shape.outer == 1 || strides.outer % vec == 0) && (shape.inner == 1 || strides.inner % vec == 0) &&
         (shape.rows == 1 || strides.row % vec == 0);
}

template <typename T, Norm norm, bool with_grad>
void run(const void* x, void* grad, void* loss, void* partials, const RowShape& shape, const RowStrides& x_strides,
         const RowStrides& grad_strides, void* stream) {
  using A = Accumulator<T>;
  constexpr int wide = vector_bytes / sizeof(T);
  const bool fit = vectors_fit<T>(x, shape, x_strides) && (!with_grad || vectors_fit<T>(grad, shape, grad_strides));
  auto kernel = tv_loss_kernel<T, 1, 0, norm, with_grad>;
  int vec = 1;
  if (fit && shape.step == 1) {
    kernel = tv_loss_kernel<T, wide, 1, norm, with_grad>;
    vec = wide;
  }
  if constexpr (wide > 3) {
    if (fit && shape.step == 3) {
      kernel = tv_loss_kernel<T, wide, 3, norm, with_grad>;
      vec = wide;
    }
  }
  const Tiling tiles(shape, vec);
  if (tiles.count > 0) {
    launch("tv_loss", kernel, tiles.blocks(), threads_per_block, stream, static_cast<const T*>(x),
           static_cast<T*>(grad), static_cast<A*>(partials), shape, x_strides, grad_strides, tiles);
  }
  launch("sum_partials", sum_partials_kernel<A>, 1u, sum_threads, stream, static_cast<const A*>(partials),
         static_cast<A*>(loss), static_cast<int>(tiles.blocks()));
}

}  // namespace

// The count for vectors of one element. Wider vectors need fewer.
std::int64_t tv_loss_partials(const RowShape& shape) { return Tiling(shape, 1).blocks(); }

void tv_loss_fwd_cuda(const void* x, void* grad, void* loss, void* partials, DType dtype, Norm norm,
                      const RowShape& shape, const RowStrides& x_strides, const RowStrides& grad_strides,
                      void* stream) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run_norm = norm == Norm::l2 ? (grad ? run<T, Norm::l2, true> : run<T, Norm::l2, false>)
                                           : (grad ? run<T, Norm::l1, true> : run<T, Norm::l1, false>);
    run_norm(x, grad, loss, partials, shape, x_strides, grad_strides, stream);
  });
}

}  // namespace fastperc
