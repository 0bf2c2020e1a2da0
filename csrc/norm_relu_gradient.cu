// The gradients of norms and of the activation after them on a GPU: the backward passes of norm_relu.cpp, bitwise
// repeatable (no atomics).
#include "norm_passes.cuh"

namespace fastperc {
namespace {

template <typename T, int vec, int width>
__global__ void __launch_bounds__(most_threads, 2)
    gradient_sums_kernel(const T* __restrict x_ptr, const T* __restrict grad_ptr,  // activations
                         NormPointers norm,                                        // [norms, channels] each
                         const T* __restrict y_ptr, T* __restrict masked_ptr,      // activations, or null
                         float* __restrict partials_ptr,                           // [images, channels, tiles, 3]
                         Walk walk, std::int64_t norm_step, Activation activation) {
  const Place place(walk);
  const std::int64_t factors = place.image * norm_step;
  float mean[width], scale[width], shift[width], slopes[width];
  load_factors(mean, norm.mean, factors, place);
  load_factors(scale, norm.scale, factors, place);
  load_factors(shift, norm.shift, factors, place);
  load_factors(slopes, activation.slopes, 0, place, activation.slope);
  float sums[3 * width] = {};
  struct Item {
    Vector<T, vec> x, grad, y;
  };
  for_each_item<(width > 4 ? 1 : 2)>(  // one more would not fit the registers
      walk, place,
      [&](std::int64_t, std::int64_t offset) {
        Item loaded;
        loaded.x = load<vec>(x_ptr + offset);
        loaded.grad = load<vec>(grad_ptr + offset);
        if (y_ptr) loaded.y = load<vec>(y_ptr + offset);
        return loaded;
      },
      [&](std::int64_t, std::int64_t offset, const Item& item) {
        Vector<T, vec> masked;
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          const int c = j % width;
          const float x = widen(item.x.at[j]), grad = widen(item.grad.at[j]);
          const float z = y_ptr ? widen(item.y.at[j]) : normalised(x, mean[c], scale[c], shift[c]);
          const float g = before(activation.kind, grad, z, slopes[c]);
          sums[c] += g;
          sums[width + c] += g * (x - mean[c]);
          sums[2 * width + c] += slope_gradient(grad, z);
          narrow(g, masked.at[j]);
        }
        if (masked_ptr) store(masked_ptr + offset, masked);
      });
  sum_over_lanes(sums, walk, place.lane);
  if (place.active && place.lane == 0) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const std::int64_t channel = place.image * walk.channels + place.unit * width + j;
      float* partials = partials_ptr + (channel * walk.tiles + place.tile) * 3;
#pragma unroll
      for (int k = 0; k < 3; ++k) partials[k] = sums[k * width + j];
    }
  }
}

// One block for each channel of each norm.
__global__ void __launch_bounds__(combine_threads)
    combine_sums_kernel(const float* __restrict partials_ptr,     // [images, channels, tiles, 3]
                        const double* __restrict statistics_ptr,  // [norms, 2, channels]
                        const float* __restrict mean_ptr,         // [norms, channels], rounded
                        double* __restrict sums_ptr,              // [norms, rows, channels]
                        int rows,
                        unsigned images,  // of a norm
                        unsigned channels, unsigned tiles) {
  const std::int64_t channel = blockIdx.x % channels, norm = blockIdx.x / channels;
  double sums[3] = {};
  for (unsigned i = threadIdx.x; i < images * tiles; i += combine_threads) {  // no more than a grid has blocks
    const std::int64_t image = i / tiles, tile = i % tiles;
    const float* partials = partials_ptr + (((norm * images + image) * channels + channel) * tiles + tile) * 3;
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += partials[k];
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] = block_sum<combine_threads>(sums[k]);
  if (threadIdx.x == 0) {
    const double mean = statistics_ptr[norm * 2 * channels + channel];
    sums[1] = with_exact_mean(sums[1], sums[0], mean, mean_ptr[norm * channels + channel]);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (k < rows) sums_ptr[(norm * rows + k) * channels + channel] = sums[k];
    }
  }
}

template <typename T, int vec, int width>
__global__ void __launch_bounds__(most_threads, 2)
    gradient_kernel(const T* __restrict x_ptr, const T* __restrict grad_ptr,  // activations
                    NormPointers norm,                                        // [norms, channels] each
                    const float* __restrict factors_ptr,                      // [norms, 3, channels]
                    T* __restrict out_ptr,                                    // activations
                    Walk walk, std::int64_t norm_step, Activation activation) {
  const Place place(walk);
  const std::int64_t first = place.image * norm_step;
  float mean[width], scale[width], shift[width], slopes[width], of_grad[width], of_x[width], constant[width];
  load_factors(mean, norm.mean, first, place);
  load_factors(scale, norm.scale, first, place);
  load_factors(shift, norm.shift, first, place);
  load_factors(slopes, activation.slopes, 0, place, activation.slope);
  load_factors(of_grad, factors_ptr, 3 * first, place);
  load_factors(of_x, factors_ptr, 3 * first + walk.channels, place);
  load_factors(constant, factors_ptr, 3 * first + 2 * walk.channels, place);
  struct Item {
    Vector<T, vec> x, grad;
  };
  for_each_item<2>(
      walk, place,
      [&](std::int64_t, std::int64_t offset) { return Item{load<vec>(x_ptr + offset), load<vec>(grad_ptr + offset)}; },
      [&](std::int64_t, std::int64_t offset, const Item& item) {
        Vector<T, vec> out;
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          const int c = j % width;
          const float x = widen(item.x.at[j]);
          const float z = normalised(x, mean[c], scale[c], shift[c]);
          const float g = before(activation.kind, widen(item.grad.at[j]), z, slopes[c]);
          narrow(input_gradient(g, x, mean[c], of_grad[c], of_x[c], constant[c]), out.at[j]);
        }
        store(out_ptr + offset, out);
      });
}

}  // namespace

void norm_gradient_factors_cuda(const Statistics& of, const NormParameters& parameters, const double* sums,
                                std::int64_t rows, float* factors, std::int64_t images, std::int64_t channels,
                                void* stream) {
  for_each("norm_gradient_factors", images * channels, GradientFactors{of, parameters, sums, rows, factors, channels},
           stream);
}

void norm_parameter_gradients_cuda(const Statistics& of, double eps, const double* sums, std::int64_t rows,
                                   float* gradients, std::int64_t images, std::int64_t channels, void* stream) {
  for_each("norm_parameter_gradients", channels, ParameterGradients{of, eps, sums, rows, gradients, images, channels},
           stream);
}

void norm_gradient_sums_cuda(const void* x, const void* grad, const NormPointers& norm, const double* statistics,
                             double* sums, float* partials, DType dtype, const NormShape& shape,
                             const Activation& activation, const GradientExtras& extras, void* stream) {
  dispatch_variant(dtype, shape, {x, grad, extras.y, extras.masked}, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Walk walk(shape, V::vec);
    launch("norm_gradient_sums", gradient_sums_kernel<T, V::vec, V::width>, walk.blocks, walk.threads, stream,
           static_cast<const T*>(x), static_cast<const T*>(grad), norm, static_cast<const T*>(extras.y),
           static_cast<T*>(extras.masked), partials, walk, shape.norm_step(), activation);
    launch("combine_sums", combine_sums_kernel, grid_size("norm_relu", shape.norms() * shape.channels), combine_threads,
           stream, static_cast<const float*>(partials), statistics, norm.mean, sums,
           activation.kind == ActivationKind::slopes ? 3 : 2, shape.norm_images(),
           static_cast<unsigned>(shape.channels), walk.tiles);
  });
}

void norm_gradient_cuda(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                        DType dtype, const NormShape& shape, const Activation& activation, void* stream) {
  dispatch_variant(dtype, shape, {x, grad, out}, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Walk walk(shape, V::vec);
    launch("norm_gradient", gradient_kernel<T, V::vec, V::width>, walk.blocks, walk.threads, stream,
           static_cast<const T*>(x), static_cast<const T*>(grad), norm, factors, static_cast<T*>(out), walk,
           shape.norm_step(), activation);
  });
}

}  // namespace fastperc
