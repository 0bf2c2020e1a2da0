// Norms and the ReLU after them, on the CPU and on NHWC activations. The forward takes the statistics of each channel
// of each image, then scales, shifts, adds a skip and applies ReLU in one pass. The backward takes two passes. A batch
// norm is computed as if all images were one.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr std::int64_t elements_per_task = 1 << 16;
constexpr std::int64_t pixels_at_once = 64;  // summed in float before the sum is added in double

// sums [channels] += Σ x over `pixels` pixels or, unless mean is null, Σ (x − mean)².
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

// out = relu?(x · scale + shift + skip?) over `pixels` consecutive pixels. Those of skip are `skip_step` elements
// apart.
template <typename T>
FASTPERC_INLINE void apply(const T* x, const float* __restrict scale, const float* __restrict shift, const T* skip,
                           std::int64_t skip_step, bool relu, T* out, std::int64_t pixels, std::int64_t channels) {
  for (std::int64_t p = 0; p < pixels; ++p) {
    const T *pixel = x + p * channels, *skip_pixel = skip ? skip + p * skip_step : nullptr;
    T* out_pixel = out + p * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      float y = static_cast<float>(widen(pixel[c])) * scale[c] + shift[c];
      if (skip_pixel) y += static_cast<float>(widen(skip_pixel[c]));
      narrow(relu && y < 0 ? 0.0f : y, out_pixel[c]);  // NaN stays NaN
    }
  }
}

// The gradient before the ReLU. The ReLU is computed again to see where its input was positive or NaN.
FASTPERC_INLINE float before_relu(float grad, float x, float scale, float shift, bool relu) {
  return relu && x * scale + shift <= 0 ? 0.0f : grad;
}

// sums [2][channels] += Σ g and Σ g · (x − mean) over `pixels` pixels, where g is the gradient before the ReLU.
template <typename T>
FASTPERC_INLINE void add_up_gradients(const T* __restrict x, const T* __restrict grad, const NormPointers& norm,
                                      bool relu, double* __restrict sums, float* __restrict partial,
                                      std::int64_t pixels, std::int64_t channels) {
  const float* __restrict mean = norm.mean;
  const float* __restrict scale = norm.scale;
  const float* __restrict shift = norm.shift;
  float* __restrict products = partial + channels;
  for (std::int64_t begin = 0; begin < pixels; begin += pixels_at_once) {
    const std::int64_t end = std::min(begin + pixels_at_once, pixels);
    std::fill(partial, partial + 2 * channels, 0.0f);
    for (std::int64_t p = begin; p < end; ++p) {
      const T *pixel = x + p * channels, *gradient = grad + p * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        const float value = static_cast<float>(widen(pixel[c]));
        const float g = before_relu(static_cast<float>(widen(gradient[c])), value, scale[c], shift[c], relu);
        partial[c] += g;
        products[c] += g * (value - mean[c]);
      }
    }
    for (std::int64_t c = 0; c < 2 * channels; ++c) sums[c] += partial[c];
  }
}

// out = g · of_grad + (x − mean) · of_x + constant, per channel.
template <typename T>
FASTPERC_INLINE void apply_gradients(const T* __restrict x, const T* __restrict grad, const NormPointers& norm,
                                     const float* __restrict of_grad, const float* __restrict of_x,
                                     const float* __restrict constant, bool relu, T* __restrict out,
                                     std::int64_t pixels, std::int64_t channels) {
  const float* __restrict mean = norm.mean;
  const float* __restrict scale = norm.scale;
  const float* __restrict shift = norm.shift;
  for (std::int64_t p = 0; p < pixels; ++p) {
    const T *pixel = x + p * channels, *gradient = grad + p * channels;
    T* out_pixel = out + p * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      const float value = static_cast<float>(widen(pixel[c]));
      const float g = before_relu(static_cast<float>(widen(gradient[c])), value, scale[c], shift[c], relu);
      narrow(g * of_grad[c] + (value - mean[c]) * of_x[c] + constant[c], out_pixel[c]);
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
  }                                                                                                                   \
  FASTPERC_MULTIVERSION void gradient_sum_pass(const T* x, const T* grad, const NormPointers& norm, bool relu,        \
                                               double* sums, float* partial, std::int64_t pixels,                     \
                                               std::int64_t channels) {                                               \
    if (relu) {                                                                                                       \
      add_up_gradients(x, grad, norm, true, sums, partial, pixels, channels);                                         \
    } else {                                                                                                          \
      add_up_gradients(x, grad, norm, false, sums, partial, pixels, channels);                                        \
    }                                                                                                                 \
  }                                                                                                                   \
  FASTPERC_MULTIVERSION void gradient_pass(const T* x, const T* grad, const NormPointers& norm, const float* of_grad, \
                                           const float* of_x, const float* constant, bool relu, T* out,               \
                                           std::int64_t pixels, std::int64_t channels) {                              \
    if (relu) {                                                                                                       \
      apply_gradients(x, grad, norm, of_grad, of_x, constant, true, out, pixels, channels);                           \
    } else {                                                                                                          \
      apply_gradients(x, grad, norm, of_grad, of_x, constant, false, out, pixels, channels);                          \
    }                                                                                                                 \
  }
FASTPERC_PASSES(float)
FASTPERC_PASSES(Half)
FASTPERC_PASSES(BFloat16)

// Calls f with a null pointer of the element type. Activations in float64 are left to PyTorch.
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

// Splits the pixels of each image into tasks of about the same size.
struct Tasks {
  std::int64_t pixels, channels, per_image, per_task;

  explicit Tasks(const ImageShape& shape) : pixels(shape.rows * shape.columns), channels(shape.channels) {
    per_task = std::max<std::int64_t>(elements_per_task / channels, 1);
    per_image = (pixels + per_task - 1) / per_task;
  }
  std::int64_t image(std::int64_t task) const { return task / per_image; }
  std::int64_t first(std::int64_t task) const { return task % per_image * per_task; }  // within its image
  std::int64_t count(std::int64_t task) const { return std::min(per_task, pixels - first(task)); }
  std::int64_t offset(std::int64_t task) const { return (image(task) * pixels + first(task)) * channels; }
};

}  // namespace

void channel_statistics_cpu(const void* x, double* statistics, DType dtype, const ImageShape& shape, int threads) {
  const Tasks tasks(shape);
  const std::int64_t channels = shape.channels, total = shape.images * tasks.per_image;
  std::vector<double> partials(total * 2 * channels);  // mean and M2 of each task's pixels
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(total, threads, [&](std::int64_t task) {
      const std::int64_t count = tasks.count(task);
      const T* from = static_cast<const T*>(x) + tasks.offset(task);
      double *mean = partials.data() + task * 2 * channels, *m2 = mean + channels;
      std::vector<float> scratch(2 * channels);
      float *partial = scratch.data(), *rounded_mean = partial + channels;
      sum_pass(from, nullptr, mean, partial, count, channels);
      for (std::int64_t c = 0; c < channels; ++c) rounded_mean[c] = static_cast<float>(mean[c] /= count);
      sum_pass(from, rounded_mean, m2, partial, count, channels);
      for (std::int64_t c = 0; c < channels; ++c) {  // corrects m2 for the rounding of the mean
        m2[c] -= count * (mean[c] - rounded_mean[c]) * (mean[c] - rounded_mean[c]);
      }
    });
  });
  // Chan's formula, in the order of the tasks, so that the number of threads does not change the result.
  std::fill(statistics, statistics + shape.images * 2 * channels, 0.0);
  for (std::int64_t task = 0; task < total; ++task) {
    double *mean = statistics + tasks.image(task) * 2 * channels, *m2 = mean + channels;
    const double *other = partials.data() + task * 2 * channels, *other_m2 = other + channels;
    const double before = tasks.first(task), count = tasks.count(task);
    for (std::int64_t c = 0; c < channels; ++c) {
      const double d = other[c] - mean[c];
      mean[c] += d * count / (before + count);
      m2[c] += other_m2[c] + d * d * before * count / (before + count);
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
        const T* skip_row =
            skip ? static_cast<const T*>(skip) + image * skip_strides.image + row * skip_strides.row : nullptr;
        apply_pass(static_cast<const T*>(x) + i * row_length, scale + image * channels, shift + image * channels,
                   skip_row, skip_strides.column, relu, static_cast<T*>(out) + i * row_length, shape.columns, channels);
      }
    });
  });
}

void norm_gradient_sums_cpu(const void* x, const void* grad, const NormPointers& norm, double* sums, DType dtype,
                            const ImageShape& shape, bool relu, int threads) {
  const Tasks tasks(shape);
  const std::int64_t channels = shape.channels, total = shape.images * tasks.per_image;
  std::vector<double> partials(total * 2 * channels);
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(total, threads, [&](std::int64_t task) {
      std::vector<float> partial(2 * channels);
      gradient_sum_pass(static_cast<const T*>(x) + tasks.offset(task), static_cast<const T*>(grad) + tasks.offset(task),
                        norm.of_image(tasks.image(task), channels), relu, partials.data() + task * 2 * channels,
                        partial.data(), tasks.count(task), channels);
    });
  });
  std::fill(sums, sums + shape.images * 2 * channels, 0.0);
  for (std::int64_t task = 0; task < total; ++task) {  // in order: the number of threads does not change the result
    double* image_sums = sums + tasks.image(task) * 2 * channels;
    for (std::int64_t c = 0; c < 2 * channels; ++c) image_sums[c] += partials[task * 2 * channels + c];
  }
}

void norm_gradient_cpu(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                       DType dtype, const ImageShape& shape, bool relu, int threads) {
  const Tasks tasks(shape);
  const std::int64_t channels = shape.channels;
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * tasks.per_image, threads, [&](std::int64_t task) {
      const float* image_factors = factors + tasks.image(task) * 3 * channels;
      gradient_pass(static_cast<const T*>(x) + tasks.offset(task), static_cast<const T*>(grad) + tasks.offset(task),
                    norm.of_image(tasks.image(task), channels), image_factors, image_factors + channels,
                    image_factors + 2 * channels, relu, static_cast<T*>(out) + tasks.offset(task), tasks.count(task),
                    channels);
    });
  });
}

}  // namespace fastperc
