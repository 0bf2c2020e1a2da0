// Norms and the activation after them, on the CPU and on NHWC activations. The forward takes the statistics of each
// channel of each image, then scales, shifts, adds a skip and applies the activation in one pass. The backward takes
// two passes. A batch norm is computed as if all images were one.
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

// out = activation(x · scale + shift + skip?) over `pixels` consecutive pixels. Those of skip are `skip_step` elements
// apart.
template <ActivationKind kind, typename T>
FASTPERC_INLINE void apply(const T* x, const float* __restrict scale, const float* __restrict shift,
                           const float* __restrict slopes, const T* skip, std::int64_t skip_step, T* out,
                           std::int64_t pixels, std::int64_t channels) {
  constexpr bool with_slopes = kind == ActivationKind::slopes;
  for (std::int64_t p = 0; p < pixels; ++p) {
    const T *pixel = x + p * channels, *skip_pixel = skip ? skip + p * skip_step : nullptr;
    T* out_pixel = out + p * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      float y = static_cast<float>(widen(pixel[c])) * scale[c] + shift[c];
      if (skip_pixel) y += static_cast<float>(widen(skip_pixel[c]));
      narrow(activate(kind, y, with_slopes ? slopes[c] : 0), out_pixel[c]);
    }
  }
}

// sums [2 or 3][channels] += Σ g, Σ g · (x − mean) and Σ grad · min(z, 0) over `pixels` pixels, where g is the gradient
// before the activation, and z the value before it.
template <ActivationKind kind, bool extras, typename T>
FASTPERC_INLINE void add_up_gradients(const T* __restrict x, const T* __restrict grad, const NormPointers& norm,
                                      const float* __restrict slopes, const T* __restrict y, T* __restrict masked,
                                      double* __restrict sums, float* __restrict partial, std::int64_t pixels,
                                      std::int64_t channels) {
  constexpr bool with_slopes = kind == ActivationKind::slopes;
  const std::int64_t rows = with_slopes ? 3 : 2;
  const float* __restrict mean = norm.mean;
  const float* __restrict scale = norm.scale;
  const float* __restrict shift = norm.shift;
  float* __restrict products = partial + channels, * __restrict of_slopes = partial + 2 * channels;
  for (std::int64_t begin = 0; begin < pixels; begin += pixels_at_once) {
    const std::int64_t end = std::min(begin + pixels_at_once, pixels);
    std::fill(partial, partial + rows * channels, 0.0f);
    for (std::int64_t p = begin; p < end; ++p) {
      const T *pixel = x + p * channels, *gradient = grad + p * channels;
#pragma GCC ivdep
      for (std::int64_t c = 0; c < channels; ++c) {
        const float value = static_cast<float>(widen(pixel[c])), after = static_cast<float>(widen(gradient[c]));
        const float z = extras ? static_cast<float>(widen(y[p * channels + c])) : value * scale[c] + shift[c];
        const float g = before(kind, after, z, with_slopes ? slopes[c] : 0);
        partial[c] += g;
        products[c] += g * (value - mean[c]);
        if (with_slopes) of_slopes[c] += slope_gradient(after, z);
        if (extras) narrow(g, masked[p * channels + c]);
      }
    }
    for (std::int64_t c = 0; c < rows * channels; ++c) sums[c] += partial[c];
  }
}

// out = g · of_grad + (x − mean) · of_x + constant, per channel.
template <ActivationKind kind, typename T>
FASTPERC_INLINE void apply_gradients(const T* __restrict x, const T* __restrict grad, const NormPointers& norm,
                                     const float* __restrict slopes, const float* __restrict factors, T* __restrict out,
                                     std::int64_t pixels, std::int64_t channels) {
  constexpr bool with_slopes = kind == ActivationKind::slopes;
  const float* __restrict mean = norm.mean;
  const float* __restrict scale = norm.scale;
  const float* __restrict shift = norm.shift;
  const float* __restrict of_grad = factors, * __restrict of_x = factors + channels;
  const float* __restrict constant = factors + 2 * channels;
  for (std::int64_t p = 0; p < pixels; ++p) {
    const T *pixel = x + p * channels, *gradient = grad + p * channels;
    T* out_pixel = out + p * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      const float value = static_cast<float>(widen(pixel[c])), after = static_cast<float>(widen(gradient[c]));
      const float g = before(kind, after, value * scale[c] + shift[c], with_slopes ? slopes[c] : 0);
      narrow(input_gradient(g, value, mean[c], of_grad[c], of_x[c], constant[c]), out_pixel[c]);
    }
  }
}

// Runs `call` with the template parameter `kind`.
#define FASTPERC_BY_KIND(activation, call)          \
  switch (activation.kind) {                        \
    case ActivationKind::none: {                    \
      constexpr auto kind = ActivationKind::none;   \
      return call;                                  \
    }                                               \
    case ActivationKind::relu: {                    \
      constexpr auto kind = ActivationKind::relu;   \
      return call;                                  \
    }                                               \
    case ActivationKind::slopes: {                  \
      constexpr auto kind = ActivationKind::slopes; \
      return call;                                  \
    }                                               \
    case ActivationKind::relu6: {                   \
      constexpr auto kind = ActivationKind::relu6;  \
      return call;                                  \
    }                                               \
  }

#define FASTPERC_PASSES(T)                                                                                             \
  FASTPERC_MULTIVERSION void sum_pass(const T* x, const float* mean, double* sums, float* partial,                     \
                                      std::int64_t pixels, std::int64_t channels) {                                    \
    add_up(x, mean, sums, partial, pixels, channels);                                                                  \
  }                                                                                                                    \
  FASTPERC_MULTIVERSION void apply_pass(const T* x, const float* scale, const float* shift, Activation act,            \
                                        const T* skip, std::int64_t skip_step, T* out, std::int64_t pixels,            \
                                        std::int64_t channels) {                                                       \
    if (skip) {                                                                                                        \
      FASTPERC_BY_KIND(act, apply<kind>(x, scale, shift, act.slopes, skip, skip_step, out, pixels, channels))          \
    }                                                                                                                  \
    FASTPERC_BY_KIND(act, apply<kind>(x, scale, shift, act.slopes, (const T*)nullptr, 0, out, pixels, channels))       \
  }                                                                                                                    \
  FASTPERC_MULTIVERSION void gradient_sum_pass(const T* x, const T* grad, const NormPointers& norm, Activation act,    \
                                               const T* y, T* masked, double* sums, float* partial,                    \
                                               std::int64_t pixels, std::int64_t channels) {                           \
    if (y) {                                                                                                           \
      FASTPERC_BY_KIND(                                                                                                \
          act, (add_up_gradients<kind, true>(x, grad, norm, act.slopes, y, masked, sums, partial, pixels, channels)))  \
    }                                                                                                                  \
    FASTPERC_BY_KIND(                                                                                                  \
        act, (add_up_gradients<kind, false>(x, grad, norm, act.slopes, y, masked, sums, partial, pixels, channels)))   \
  }                                                                                                                    \
  FASTPERC_MULTIVERSION void gradient_pass(const T* x, const T* grad, const NormPointers& norm, Activation act,        \
                                           const float* factors, T* out, std::int64_t pixels, std::int64_t channels) { \
    FASTPERC_BY_KIND(act, apply_gradients<kind>(x, grad, norm, act.slopes, factors, out, pixels, channels))            \
  }
FASTPERC_PASSES(float)
FASTPERC_PASSES(Half)
FASTPERC_PASSES(BFloat16)

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

template <typename F>
void for_each(std::int64_t count, const F& f) {
  for (std::int64_t i = 0; i < count; ++i) f(i);
}

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
                     const ImageShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                     int threads) {
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
                   activation, skip_row, skip_strides.column, static_cast<T*>(out) + i * row_length, shape.columns,
                   channels);
      }
    });
  });
}

void norm_from_statistics_cpu(const Statistics& of, const NormParameters& parameters, float* norm, std::int64_t images,
                              std::int64_t channels) {
  for_each(images * channels, NormFromStatistics{of, parameters, norm, images, channels, false});
}

void update_running_statistics_cpu(const Statistics& of, double share, float* mean, float* variance,
                                   std::int64_t channels) {
  for_each(channels, RunningStatistics{of, share, mean, variance, channels});
}

void norm_gradient_factors_cpu(const Statistics& of, const NormParameters& parameters, const double* sums,
                               std::int64_t rows, float* factors, std::int64_t images, std::int64_t channels) {
  for_each(images * channels, GradientFactors{of, parameters, sums, rows, factors, channels});
}

void norm_parameter_gradients_cpu(const Statistics& of, double eps, const double* sums, std::int64_t rows,
                                  float* gradients, std::int64_t images, std::int64_t channels) {
  for_each(channels, ParameterGradients{of, eps, sums, rows, gradients, images, channels});
}

void norm_gradient_sums_cpu(const void* x, const void* grad, const NormPointers& norm, const double* statistics,
                            double* sums, DType dtype, const ImageShape& shape, const Activation& activation,
                            const GradientExtras& extras, int threads) {
  const Tasks tasks(shape);
  const std::int64_t channels = shape.channels, total = shape.images * tasks.per_image;
  const std::int64_t row = (activation.kind == ActivationKind::slopes ? 3 : 2) * channels;
  std::vector<double> partials(total * row);
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(total, threads, [&](std::int64_t task) {
      std::vector<float> partial(row);
      const std::int64_t offset = tasks.offset(task);
      gradient_sum_pass(static_cast<const T*>(x) + offset, static_cast<const T*>(grad) + offset,
                        norm.of_image(tasks.image(task), channels), activation,
                        extras.y ? static_cast<const T*>(extras.y) + offset : nullptr,
                        extras.masked ? static_cast<T*>(extras.masked) + offset : nullptr, partials.data() + task * row,
                        partial.data(), tasks.count(task), channels);
    });
  });
  std::fill(sums, sums + shape.images * row, 0.0);
  for (std::int64_t task = 0; task < total; ++task) {  // in order: the number of threads does not change the result
    double* image_sums = sums + tasks.image(task) * row;
    for (std::int64_t c = 0; c < row; ++c) image_sums[c] += partials[task * row + c];
  }
  for (std::int64_t i = 0; i < shape.images * channels; ++i) {  // the part of the mean that float32 cannot hold
    const std::int64_t image = i / channels, c = i % channels;
    double* product = sums + image * row + channels + c;
    *product = with_exact_mean(*product, product[-channels], statistics[image * 2 * channels + c], norm.mean[i]);
  }
}

void norm_gradient_cpu(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                       DType dtype, const ImageShape& shape, const Activation& activation, int threads) {
  const Tasks tasks(shape);
  const std::int64_t channels = shape.channels;
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(shape.images * tasks.per_image, threads, [&](std::int64_t task) {
      gradient_pass(static_cast<const T*>(x) + tasks.offset(task), static_cast<const T*>(grad) + tasks.offset(task),
                    norm.of_image(tasks.image(task), channels), activation, factors + tasks.image(task) * 3 * channels,
                    static_cast<T*>(out) + tasks.offset(task), tasks.count(task), channels);
    });
  });
}

}  // namespace fastperc
