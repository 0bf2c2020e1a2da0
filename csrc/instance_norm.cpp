// Instance norm on the CPU, on activations as convolutions leave them, NHWC: the statistics of each channel of each
// image, then one pass that scales, shifts, adds a skip and applies ReLU.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr std::int64_t elements_per_task = 1 << 16;
constexpr std::int64_t pixels_at_once = 64;  // whose sums are kept in float

// sums [channels] += Σ x, or Σ (x − mean)² where there is a mean, over `pixels` pixels.
template <typename T>
FASTPERC_INLINE void add_up(const T* __restrict x, const float* __restrict mean, double* __restrict sums,
                            float* __restrict partial, std::int64_t pixels, std::int64_t channels) {
  for (std::int64_t begin = 0; begin < pixels; begin += pixels_at_once) {
    const std::int64_t end = std::min(begin + pixels_at_once, pixels);
    std::fill(partial, partial + channels, 0.0f);
    for (std::int64_t p = begin; p < end; ++p) {
      const T* pixel = x + p * channels;
      if (mean) {
        for (std::int64_t c = 0; c < channels; ++c) {
          const float d = static_cast<float>(widen(pixel[c])) - mean[c];
          partial[c] += d * d;
        }
      } else {
        for (std::int64_t c = 0; c < channels; ++c) partial[c] += static_cast<float>(widen(pixel[c]));
      }
    }
    for (std::int64_t c = 0; c < channels; ++c) sums[c] += partial[c];
  }
}

// out = relu?(x · scale + shift + skip?) over `pixels` consecutive pixels; skip's are `skip_step` elements apart.
template <typename T>
FASTPERC_INLINE void apply(const T* x, const float* __restrict scale, const float* __restrict shift, const T* skip,
                           std::int64_t skip_step, bool relu, T* out, std::int64_t pixels, std::int64_t channels) {
  for (std::int64_t p = 0; p < pixels; ++p) {
    const T *pixel = x + p * channels, *beside = skip ? skip + p * skip_step : nullptr;
    T* to = out + p * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      float y = static_cast<float>(widen(pixel[c])) * scale[c] + shift[c];
      if (beside) y += static_cast<float>(widen(beside[c]));
      narrow(relu && y < 0 ? 0.0f : y, to[c]);  // NaN stays
    }
  }
}

#define FASTPERC_PASSES(T)                                                                                            \
  FASTPERC_MULTIVERSION void sum_pass(const T* x, const float* mean, double* sums, float* partial,                    \
                                      std::int64_t pixels, std::int64_t channels) {                                   \
    add_up(x, mean, sums, partial, pixels, channels);                                                                 \
  }                                                                                                                   \
  FASTPERC_MULTIVERSION void apply_pass(const T* x, const float* scale, const float* shift, const T* skip,            \
                                        std::int64_t skip_step, bool relu, T* out, std::int64_t pixels,               \
                                        std::int64_t channels) {                                                      \
    if (skip) {                                                                                                       \
      apply(x, scale, shift, skip, skip_step, relu, out, pixels, channels);                                           \
    } else if (relu) {                                                                                                \
      apply<T>(x, scale, shift, nullptr, 0, true, out, pixels, channels);                                             \
    } else {                                                                                                          \
      apply<T>(x, scale, shift, nullptr, 0, false, out, pixels, channels);                                            \
    }                                                                                                                 \
  }
FASTPERC_PASSES(float)
FASTPERC_PASSES(Half)
FASTPERC_PASSES(BFloat16)

// Calls f with a null pointer of the element type; a float64 activation is left to PyTorch.
template <typename F>
void dispatch_narrow(DType dtype, F&& f) {
  dispatch(dtype, [&](auto* type) {
    if constexpr (std::is_same_v<std::remove_pointer_t<decltype(type)>, double>) {
      throw std::invalid_argument("fastperc: instance_norm: no kernel for float64");
    } else {
      f(type);
    }
  });
}

}  // namespace

void channel_statistics_cpu(const void* x, double* statistics, DType dtype, const ImageShape& shape, int threads) {
  const std::int64_t channels = shape.channels, pixels = shape.rows * shape.columns;
  const std::int64_t per_task = std::max<std::int64_t>(elements_per_task / channels, 1);
  const std::int64_t tasks = (pixels + per_task - 1) / per_task;
  std::vector<double> partials(shape.images * tasks * 2 * channels);  // mean and M2 of each task's pixels
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * tasks, threads, [&](std::int64_t task) {
      const std::int64_t image = task / tasks, begin = task % tasks * per_task;
      const std::int64_t count = std::min(per_task, pixels - begin);
      const T* from = static_cast<const T*>(x) + (image * pixels + begin) * channels;
      double *mean = partials.data() + task * 2 * channels, *m2 = mean + channels;
      std::vector<float> scratch(2 * channels);
      float *partial = scratch.data(), *about = partial + channels;
      sum_pass(from, nullptr, mean, partial, count, channels);
      for (std::int64_t c = 0; c < channels; ++c) about[c] = static_cast<float>(mean[c] /= count);
      sum_pass(from, about, m2, partial, count, channels);
      for (std::int64_t c = 0; c < channels; ++c) {  // about the mean itself, not the float beside it
        m2[c] -= count * (mean[c] - about[c]) * (mean[c] - about[c]);
      }
    });
  });
  // Chan's formula, task by task: the same whatever the number of threads.
  for (std::int64_t image = 0; image < shape.images; ++image) {
    double *mean = statistics + image * 2 * channels, *m2 = mean + channels;
    std::fill(mean, mean + 2 * channels, 0.0);
    for (std::int64_t task = 0; task < tasks; ++task) {
      const double *other = partials.data() + (image * tasks + task) * 2 * channels, *other_m2 = other + channels;
      const double before = task * per_task, count = std::min(per_task, pixels - task * per_task);
      for (std::int64_t c = 0; c < channels; ++c) {
        const double d = other[c] - mean[c];
        mean[c] += d * count / (before + count);
        m2[c] += other_m2[c] + d * d * before * count / (before + count);
      }
    }
  }
}

void scale_shift_cpu(const void* x, const float* scale, const float* shift, const void* skip, void* out, DType dtype,
                     const ImageShape& shape, const ImageStrides& skip_strides, bool relu, int threads) {
  const std::int64_t channels = shape.channels, row_length = shape.columns * channels;
  const std::int64_t per_task = std::max<std::int64_t>(elements_per_task / std::max<std::int64_t>(row_length, 1), 1);
  const std::int64_t total = shape.images * shape.rows;
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for((total + per_task - 1) / per_task, threads, [&](std::int64_t task) {
      for (std::int64_t i = task * per_task; i < total && i < (task + 1) * per_task; ++i) {
        const std::int64_t image = i / shape.rows, row = i % shape.rows;
        const T* beside =
            skip ? static_cast<const T*>(skip) + image * skip_strides.image + row * skip_strides.row : nullptr;
        apply_pass(static_cast<const T*>(x) + i * row_length, scale + image * channels, shift + image * channels,
                   beside, skip_strides.column, relu, static_cast<T*>(out) + i * row_length, shape.columns, channels);
      }
    });
  });
}

}  // namespace fastperc
