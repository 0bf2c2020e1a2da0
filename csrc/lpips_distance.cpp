// LPIPS on the CPU: distances and gradients in one pass over two feature maps. A pixel's features are read from memory
// once and then stay in the cache.
// Without fused multiply-add: a product fused into a difference would leave a distance between equal images.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "lpips_distance.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr std::int64_t elements_per_task = 1 << 16;
constexpr std::int64_t pixels_at_once = 16;  // whose channels are gathered together where a pixel's are not adjacent
constexpr std::int64_t lanes = 16;           // partial sums, so that the order of summation is the same everywhere

// The sum of partial sums.
template <typename A>
FASTPERC_INLINE A total(A* partial) {
  for (std::int64_t width = lanes / 2; width > 0; width /= 2) {
    for (std::int64_t k = 0; k < width; ++k) partial[k] += partial[k + width];
  }
  return partial[0];
}

// Adds term(c) of every channel c, by lanes, with the loop over lanes of a constant length, which compilers vectorise.
template <typename F>
FASTPERC_INLINE void for_channels(std::int64_t channels, F&& f) {
  std::int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    for (std::int64_t k = 0; k < lanes; ++k) f(c + k, k);
  }
  for (std::int64_t k = 0; c + k < channels; ++k) f(c + k, k);
}

// A pixel's norms, and what follows from them.
template <typename A>
struct Pixel {
  A norm[2], inverse[2];

  FASTPERC_INLINE Pixel(const A* __restrict a, const A* __restrict b, std::int64_t channels) {
    A squares_a[lanes] = {}, squares_b[lanes] = {};
    for_channels(channels, [&](std::int64_t c, std::int64_t k) {
      squares_a[k] += a[c] * a[c];
      squares_b[k] += b[c] * b[c];
    });
    norm[0] = std::sqrt(total(squares_a));
    norm[1] = std::sqrt(total(squares_b));
    for (int side = 0; side < 2; ++side) inverse[side] = A(1) / (norm[side] + A(lpips_eps));
  }
};

// The distance of a pixel.
template <typename A>
FASTPERC_INLINE A distance(const Pixel<A>& pixel, const A* __restrict a, const A* __restrict b,
                           const A* __restrict weight, std::int64_t channels) {
  const A inverse_a = pixel.inverse[0], inverse_b = pixel.inverse[1];
  A sums[lanes] = {};
  for_channels(channels, [&](std::int64_t c, std::int64_t k) {
    const A difference = a[c] * inverse_a - b[c] * inverse_b;
    sums[k] += weight[c] * difference * difference;
  });
  return total(sums);
}

// out [C] = scale · unit of one side: a of `own`, or b with the two exchanged, which changes the sign of g.
template <typename A>
FASTPERC_INLINE void gradient(const Pixel<A>& pixel, int side, const A* __restrict own, const A* __restrict other,
                              const A* __restrict weight, A scale, bool after_relu, A* __restrict out,
                              std::int64_t channels) {
  const A norm = pixel.norm[side], inverse = pixel.inverse[side], inverse_other = pixel.inverse[1 - side];
  if (norm == A(0)) {
    std::fill(out, out + channels, A(0));
    return;
  }
  A sums[lanes] = {};
  for_channels(channels, [&](std::int64_t c, std::int64_t k) {
    sums[k] += own[c] * (A(2) * weight[c] * (own[c] * inverse - other[c] * inverse_other));
  });
  const A along = total(sums) / norm * inverse;
  for_channels(channels, [&](std::int64_t c, std::int64_t) {
    const A g = A(2) * weight[c] * (own[c] * inverse - other[c] * inverse_other);
    const A value = scale * (g - own[c] * along);
    out[c] = after_relu && own[c] <= A(0) ? A(0) : value;
  });
}

// Where the rows of channels of a few pixels lie: in the tensor itself, or copied to scratch [pixels, C].
template <typename T, typename A>
FASTPERC_INLINE const A* gather(const T* from, const FeatureStrides& strides, std::int64_t count, std::int64_t channels,
                                A* scratch, std::int64_t& step) {
  if constexpr (std::is_same_v<T, A>) {
    if (strides.channel == 1) {
      step = strides.pixel;
      return from;
    }
  }
  step = channels;
  if (strides.channel == 1) {
    for (std::int64_t p = 0; p < count; ++p) {
      const T* pixel = from + p * strides.pixel;
      for (std::int64_t c = 0; c < channels; ++c) scratch[p * channels + c] = widen(pixel[c]);
    }
  } else {
    for (std::int64_t c = 0; c < channels; ++c) {
      const T* channel = from + c * strides.channel;
      for (std::int64_t p = 0; p < count; ++p) scratch[p * channels + c] = widen(channel[p * strides.pixel]);
    }
  }
  return scratch;
}

// The reverse, of rows in scratch.
template <typename T, typename A>
FASTPERC_INLINE void scatter(const A* __restrict scratch, T* __restrict out, const FeatureStrides& strides,
                             std::int64_t count, std::int64_t channels) {
  if (strides.channel == 1) {
    for (std::int64_t p = 0; p < count; ++p) {
      for (std::int64_t c = 0; c < channels; ++c) narrow(scratch[p * channels + c], out[p * strides.pixel + c]);
    }
  } else {
    for (std::int64_t c = 0; c < channels; ++c) {
      T* channel = out + c * strides.channel;
      for (std::int64_t p = 0; p < count; ++p) narrow(scratch[p * channels + c], channel[p * strides.pixel]);
    }
  }
}

// Pixels [first, first + count) of an image, at most pixels_at_once. scratch: 4 · pixels_at_once · C elements.
template <typename T, typename A>
FASTPERC_INLINE void few_pixels(const LpipsTensors& tensors, const FeatureShape& shape, std::int64_t image,
                                std::int64_t first, std::int64_t count, A* scratch) {
  const std::int64_t channels = shape.channels, begin = image * shape.pixels + first, rows = pixels_at_once * channels;
  const A *weight = static_cast<const A*>(tensors.weight), *features[2];
  std::int64_t step[2];
  for (int side = 0; side < 2; ++side) {
    const FeatureStrides& strides = tensors.strides[side];
    const T* from = static_cast<const T*>(tensors.features[side]) + image * strides.image + first * strides.pixel;
    features[side] = gather(from, strides, count, channels, scratch + side * rows, step[side]);
  }
  A* const results[2] = {scratch + 2 * rows, scratch + 3 * rows};
  for (std::int64_t p = 0; p < count; ++p) {
    const A *a = features[0] + p * step[0], *b = features[1] + p * step[1];
    const Pixel<A> pixel(a, b, channels);
    if (tensors.distances) {
      static_cast<A*>(tensors.distances)[begin + p] = distance(pixel, a, b, weight, channels);
    }
    for (int side = 0; side < 2; ++side) {
      if (tensors.inverses[side]) static_cast<A*>(tensors.inverses[side])[begin + p] = pixel.inverse[side];
      if (!tensors.gradients[side]) continue;
      const A scale =
          tensors.incoming ? static_cast<const A*>(tensors.incoming)[begin + p] * pixel.inverse[side] : A(1);
      gradient(pixel, side, side ? b : a, side ? a : b, weight, scale, tensors.after_relu, results[side] + p * channels,
               channels);
    }
  }
  for (int side = 0; side < 2; ++side) {  // after all was read: gradients may overwrite features
    if (!tensors.gradients[side]) continue;
    const FeatureStrides& strides = tensors.gradient_strides[side];
    T* out = static_cast<T*>(tensors.gradients[side]) + image * strides.image + first * strides.pixel;
    scatter(results[side], out, strides, count, channels);
  }
}

// Plain functions, since templates cannot be compiled for several instruction sets.
#define FASTPERC_PIXELS(T)                                                                                 \
  FASTPERC_MULTIVERSION void pixels_pass(const T*, const LpipsTensors& tensors, const FeatureShape& shape, \
                                         std::int64_t image, std::int64_t first, std::int64_t count,       \
                                         Accumulator<T>* scratch) {                                        \
    for (std::int64_t i = 0; i < count; i += pixels_at_once) {                                             \
      few_pixels<T>(tensors, shape, image, first + i, std::min(pixels_at_once, count - i), scratch);       \
    }                                                                                                      \
  }
FASTPERC_PIXELS(float)
FASTPERC_PIXELS(double)
FASTPERC_PIXELS(Half)
FASTPERC_PIXELS(BFloat16)

}  // namespace

void lpips_distance_cpu(const LpipsTensors& tensors, DType dtype, const FeatureShape& shape, int threads) {
  const std::int64_t wanted = elements_per_task / std::max<std::int64_t>(shape.channels, 1) / pixels_at_once;
  const std::int64_t per_task = std::max<std::int64_t>(wanted, 1) * pixels_at_once;
  const std::int64_t per_image = (shape.pixels + per_task - 1) / per_task;
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * per_image, threads, [&](std::int64_t task) {
      std::vector<Accumulator<T>> scratch(4 * pixels_at_once * shape.channels);
      const std::int64_t first = task % per_image * per_task;
      pixels_pass(static_cast<const T*>(nullptr), tensors, shape, task / per_image, first,
                  std::min(per_task, shape.pixels - first), scratch.data());
    });
  });
}

}  // namespace fastperc
