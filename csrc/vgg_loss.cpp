// ReLU masks and pooling on the CPU: passes over memory that compilers vectorise.
//
// The output of ReLU is positive, zero or NaN. Such numbers have the same order as their bits without the sign: zeros
// of both signs are 0, and NaN is the largest. So the kernels work on unsigned integers of the size of the dtype.
#include "vgg_loss.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr std::int64_t elements_per_task = 1 << 16;
constexpr std::int64_t chunk = 64;

// An integer that orders the outputs of ReLU.
template <typename U>
FASTPERC_INLINE U key(U bits) {
  return static_cast<U>(bits << 1);
}

// Packs eight bytes that are 0 or 1 into the bits of one byte, the first byte lowest. The product collects them in its
// highest byte.
FASTPERC_INLINE std::uint8_t gather_bits(const std::uint8_t* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return static_cast<std::uint8_t>(word * 0x0102040810204080u >> 56);
}
// The reverse. A set bit becomes a byte that is not 0.
FASTPERC_INLINE void scatter_bits(std::uint8_t bits, std::uint8_t* bytes) {
  const std::uint64_t word = bits * 0x0101010101010101u & 0x8040201008040201u;
  std::memcpy(bytes, &word, sizeof word);
}

template <typename U>
FASTPERC_INLINE void mask_chunk(const U* __restrict x, std::uint8_t* __restrict bits, std::int64_t count) {
  std::uint8_t positive[chunk] = {};
  for (std::int64_t k = 0; k < count; ++k) positive[k] = key(x[k]) != 0;
  for (std::int64_t k = 0; k < count; k += 8) bits[k / 8] = gather_bits(positive + k);
}
template <typename U>
FASTPERC_INLINE void mask(const U* x, std::uint8_t* bits, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + chunk <= count; i += chunk) mask_chunk(x + i, bits + i / 8, chunk);  // a constant length, vectorised
  if (i < count) mask_chunk(x + i, bits + i / 8, count - i);
}

template <typename U>
FASTPERC_INLINE void unmask_chunk(U* __restrict grad, const std::uint8_t* __restrict bits, std::int64_t count) {
  std::uint8_t positive[chunk];
  for (std::int64_t k = 0; k < count; k += 8) scatter_bits(bits[k / 8], positive + k);
  for (std::int64_t k = 0; k < count; ++k) grad[k] = positive[k] ? grad[k] : U(0);
}
template <typename U>
FASTPERC_INLINE void unmask(U* grad, const std::uint8_t* bits, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + chunk <= count; i += chunk) unmask_chunk(grad + i, bits + i / 8, chunk);
  if (i < count) unmask_chunk(grad + i, bits + i / 8, count - i);
}

// Pools one row of windows. `upper` and `lower` are rows of the input. The first of equal pixels wins, as in PyTorch.
template <bool with_winners, typename U>
FASTPERC_INLINE void pool(const U* __restrict upper, const U* __restrict lower, U* __restrict pooled,
                          std::uint8_t* __restrict winners, std::int64_t columns, std::int64_t channels) {
  for (std::int64_t j = 0; j < columns; ++j) {
    const U *left = upper + 2 * j * channels, *right = left + channels;
    const U *lower_left = lower + 2 * j * channels, *lower_right = lower_left + channels;
    U* out = pooled + j * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      const bool right_wins = key(right[c]) > key(left[c]), lower_right_wins = key(lower_right[c]) > key(lower_left[c]);
      const U above = right_wins ? right[c] : left[c], below = lower_right_wins ? lower_right[c] : lower_left[c];
      const bool lower_wins = key(below) > key(above);
      out[c] = lower_wins ? below : above;
      if (with_winners) {
        const U winner = lower_wins ? U(2 + lower_right_wins) : U(right_wins);
        winners[j * channels + c] = static_cast<std::uint8_t>(key(out[c]) != 0 ? winner : U(no_winner));
      }
    }
  }
}

// Writes row `row` (0 or 1) of a row of windows.
template <typename U>
FASTPERC_INLINE void unpool(const U* __restrict grad_pooled, const std::uint8_t* __restrict winners, U* __restrict grad,
                            int row, std::int64_t columns, std::int64_t channels) {
  for (std::int64_t j = 0; j < columns; ++j) {
    for (int column = 0; column < 2; ++column) {
      const std::uint8_t position = static_cast<std::uint8_t>(2 * row + column);
      U* out = grad + (2 * j + column) * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        out[c] = winners[j * channels + c] == position ? grad_pooled[j * channels + c] : U(0);
      }
    }
  }
}

// Plain functions, since templates cannot be compiled for several instruction sets. winners may be null.
#define FASTPERC_PASSES(U)                                                                                           \
  FASTPERC_MULTIVERSION void mask_pass(const U* x, std::uint8_t* bits, std::int64_t count) { mask(x, bits, count); } \
  FASTPERC_MULTIVERSION void unmask_pass(U* grad, const std::uint8_t* bits, std::int64_t count) {                    \
    unmask(grad, bits, count);                                                                                       \
  }                                                                                                                  \
  FASTPERC_MULTIVERSION void pool_pass(const U* upper, const U* lower, U* pooled, std::uint8_t* winners,             \
                                       std::int64_t columns, std::int64_t channels) {                                \
    if (winners) {                                                                                                   \
      pool<true>(upper, lower, pooled, winners, columns, channels);                                                  \
    } else {                                                                                                         \
      pool<false>(upper, lower, pooled, winners, columns, channels);                                                 \
    }                                                                                                                \
  }                                                                                                                  \
  FASTPERC_MULTIVERSION void unpool_pass(const U* grad_pooled, const std::uint8_t* winners, U* grad, int row,        \
                                         std::int64_t columns, std::int64_t channels) {                              \
    unpool(grad_pooled, winners, grad, row, columns, channels);                                                      \
  }
FASTPERC_PASSES(std::uint16_t)
FASTPERC_PASSES(std::uint32_t)
FASTPERC_PASSES(std::uint64_t)

// Calls f with a null pointer to an unsigned integer of the size of `dtype`.
template <typename F>
void dispatch_bits(DType dtype, F&& f) {
  dispatch(dtype, [&](auto* type) {
    constexpr std::size_t size = sizeof *type;
    using U = std::conditional_t<size == 2, std::uint16_t, std::conditional_t<size == 4, std::uint32_t, std::uint64_t>>;
    f(static_cast<U*>(nullptr));
  });
}

// Calls f(first, count) for parts of [0, count), each of which begins at a whole byte of the mask.
template <typename F>
void for_parts(std::int64_t count, int threads, F&& f) {
  parallel_for((count + elements_per_task - 1) / elements_per_task, threads, [&](std::int64_t task) {
    const std::int64_t first = task * elements_per_task;
    f(first, std::min(elements_per_task, count - first));
  });
}

}  // namespace

void relu_mask_fwd_cpu(const void* x, void* bits, DType dtype, std::int64_t count, int threads) {
  dispatch_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    for_parts(count, threads, [&](std::int64_t first, std::int64_t size) {
      mask_pass(static_cast<const U*>(x) + first, static_cast<std::uint8_t*>(bits) + first / 8, size);
    });
  });
}

void relu_mask_bwd_cpu(void* grad, const void* bits, DType dtype, std::int64_t count, int threads) {
  dispatch_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    for_parts(count, threads, [&](std::int64_t first, std::int64_t size) {
      unmask_pass(static_cast<U*>(grad) + first, static_cast<const std::uint8_t*>(bits) + first / 8, size);
    });
  });
}

void relu_pool_fwd_cpu(const void* x, void* pooled, void* winners, DType dtype, const ImageShape& shape,
                       std::int64_t images_with_winners, int threads) {
  const std::int64_t row = shape.columns * shape.channels, pooled_row = shape.pooled_columns() * shape.channels;
  dispatch_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * shape.pooled_rows(), threads, [&](std::int64_t task) {
      const std::int64_t image = task / shape.pooled_rows(), i = task % shape.pooled_rows();
      const U* upper = static_cast<const U*>(x) + (image * shape.rows + 2 * i) * row;
      pool_pass(upper, upper + row, static_cast<U*>(pooled) + task * pooled_row,
                image < images_with_winners ? static_cast<std::uint8_t*>(winners) + task * pooled_row : nullptr,
                shape.pooled_columns(), shape.channels);
    });
  });
}

void relu_pool_bwd_cpu(const void* grad_pooled, const void* winners, void* grad, DType dtype, const ImageShape& shape,
                       int threads) {
  const std::int64_t row = shape.columns * shape.channels, pooled_row = shape.pooled_columns() * shape.channels;
  dispatch_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * shape.rows, threads, [&](std::int64_t task) {
      const std::int64_t image = task / shape.rows, i = task % shape.rows;
      const std::int64_t window = (image * shape.pooled_rows() + i / 2) * pooled_row;
      U* out = static_cast<U*>(grad) + task * row;
      U* rest = out;  // the last row or column of an odd size, which no window covers
      if (i / 2 < shape.pooled_rows()) {
        unpool_pass(static_cast<const U*>(grad_pooled) + window, static_cast<const std::uint8_t*>(winners) + window,
                    out, static_cast<int>(i % 2), shape.pooled_columns(), shape.channels);
        rest += 2 * pooled_row;
      }
      std::fill(rest, out + row, U(0));
    });
  });
}

}  // namespace fastperc
