// Norms and the activation after them on a GPU: the forward passes of norm_relu.cpp, bitwise repeatable (no atomics).
//
// Each block writes one partial sum for each of its channels. A second kernel adds those in double, in a fixed order.
#include "norm_passes.cuh"

namespace fastperc {
namespace {

// The passes. vec: the elements of an item. width: how many channels they have, 1 or vec.

// Sums of the values of a tile about a mean that is near theirs: so no digits are lost.
struct PartialStatistics {
  float near_mean, sum, squares;
};

template <typename T, int vec, int width>
__global__ void __launch_bounds__(most_threads)
    statistics_kernel(const T* __restrict x_ptr,                   // activations
                      PartialStatistics* __restrict partials_ptr,  // [images, channels, tiles]
                      Walk walk) {
  const Place place(walk);
  const auto load_x = [&](std::int64_t, std::int64_t offset) { return load<vec>(x_ptr + offset); };
  float mean[width] = {};  // of the first item of each lane
  if (place.first < place.end) {
    const Vector<T, vec> x = load_x(0, place.offset(walk));
#pragma unroll
    for (int j = 0; j < vec; ++j) mean[j % width] += widen(x.at[j]);
  }
  sum_over_lanes(mean, walk, place.lane);
  const std::int64_t tile_begin = place.tile * walk.tile_items;
  const std::int64_t summed = min(std::int64_t(walk.lanes), walk.items - tile_begin) * (vec / width);
#pragma unroll
  for (int j = 0; j < width; ++j) mean[j] /= summed;

  float sums[2 * width] = {};
  for_each_item<4>(walk, place, load_x, [&](std::int64_t, std::int64_t, const Vector<T, vec>& x) {
#pragma unroll
    for (int j = 0; j < vec; ++j) {
      const float d = widen(x.at[j]) - mean[j % width];
      sums[j % width] += d;
      sums[width + j % width] += d * d;
    }
  });
  sum_over_lanes(sums, walk, place.lane);
  if (place.active && place.lane == 0) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const std::int64_t channel = place.image * walk.channels + place.unit * width + j;
      partials_ptr[channel * walk.tiles + place.tile] = {mean[j], sums[j], sums[width + j]};
    }
  }
}

// One block for each channel of each norm.
__global__ void __launch_bounds__(combine_threads)
    combine_statistics_kernel(const PartialStatistics* __restrict partials_ptr,  // [images, channels, tiles]
                              double* __restrict statistics_ptr,                 // [norms, 2, channels]
                              std::int64_t tile_values, std::int64_t values,     // of a channel, in a tile and an image
                              unsigned images,                                   // of a norm
                              unsigned channels, unsigned tiles) {
  const std::int64_t channel = blockIdx.x % channels, norm = blockIdx.x / channels;
  const auto over_tiles = [&](auto&& function) {
    double acc = 0;
    for (unsigned i = threadIdx.x; i < images * tiles; i += combine_threads) {  // no more than a grid has blocks
      const std::int64_t image = i / tiles, tile = i % tiles;
      const double count = static_cast<double>(min(tile_values, values - tile * tile_values));
      acc += function(partials_ptr[((norm * images + image) * channels + channel) * tiles + tile], count);
    }
    return block_sum<combine_threads>(acc);
  };
  const double total = over_tiles([](const PartialStatistics& p, double count) { return count * p.near_mean + p.sum; });
  const double mean = total / (static_cast<double>(images) * values);
  const double m2 = over_tiles([&](const PartialStatistics& p, double count) {
    const double d = p.near_mean - mean;
    return p.squares + d * (2 * p.sum + count * d);
  });
  if (threadIdx.x == 0) {
    statistics_ptr[norm * 2 * channels + channel] = mean;
    statistics_ptr[(norm * 2 + 1) * channels + channel] = m2 > 0 || m2 != m2 ? m2 : 0;
  }
}

// Where a skip lies.
struct SkipView {
  ImageStrides strides;
  std::int64_t columns;
  bool has_vectors;  // whether an item is a vector there too
};

// The item of a skip that is added to an item.
template <int vec, int width, typename T>
__device__ Vector<T, vec> load_skip(const T* skip_ptr, const SkipView& view, const Place& place, std::int64_t item) {
  const ImageStrides& strides = view.strides;
  const T* skip = skip_ptr + place.image * strides.image + place.unit * width * strides.channel;
  const auto pixel = [&](std::int64_t i) {
    const std::int64_t row = divided(i, view.columns);
    return skip + row * strides.row + (i - row * view.columns) * strides.column;
  };
  constexpr int pixels = vec / width;  // of an item
  if (view.has_vectors) return load<vec>(pixel(item * pixels));
  Vector<T, vec> result;
#pragma unroll
  for (int j = 0; j < vec; ++j) {
    result.at[j] = width == 1 ? *pixel(item * pixels + j) : pixel(item)[j * strides.channel];
  }
  return result;
}

template <typename T, int vec, int width>
__global__ void __launch_bounds__(most_threads)
    scale_shift_kernel(const T* x_ptr,     // activations
                       NormPointers norm,  // [norms, channels] each; null for 0, 1 and 0
                       const T* skip_ptr,  // activations, strided; or null
                       T* out_ptr,         // activations; may be x
                       Walk walk, SkipView skip_view, std::int64_t norm_step,  // from an image's factors to the next's
                       Activation activation) {
  const Place place(walk);
  float mean[width], scale[width], shift[width], slopes[width];
  load_factors(mean, norm.mean, place.image * norm_step, place);
  load_factors(scale, norm.scale, place.image * norm_step, place, 1.0f);
  load_factors(shift, norm.shift, place.image * norm_step, place);
  load_factors(slopes, activation.slopes, 0, place, activation.slope);
  struct Item {
    Vector<T, vec> x, skip;
  };
  for_each_item<2>(
      walk, place,
      [&](std::int64_t item, std::int64_t offset) {
        Item loaded;
        loaded.x = load<vec>(x_ptr + offset);
        if (skip_ptr) loaded.skip = load_skip<vec, width>(skip_ptr, skip_view, place, item);
        return loaded;
      },
      [&](std::int64_t, std::int64_t offset, const Item& item) {
        Vector<T, vec> out;
#pragma unroll
        for (int j = 0; j < vec; ++j) {
          const int c = j % width;
          float y = normalised(widen(item.x.at[j]), mean[c], scale[c], shift[c]);
          if (skip_ptr) y += widen(item.skip.at[j]);
          narrow(activate(activation.kind, y, slopes[c]), out.at[j]);
        }
        store(out_ptr + offset, out);
      });
}

// Whether the items of a skip are vectors as those of the activations are.
bool has_vectors(const void* skip, const NormShape& shape, const ImageStrides& strides, int vec) {
  if (vec == 1) return true;
  const auto fits = [&](std::int64_t size, std::int64_t stride) { return size == 1 || stride % vec == 0; };
  const bool is_even = reinterpret_cast<std::uintptr_t>(skip) % vector_bytes == 0 && fits(shape.images, strides.image);
  if (shape.channels_last) {
    return is_even && strides.channel == 1 && fits(shape.rows, strides.row) && fits(shape.columns, strides.column);
  }
  const bool rows_follow = shape.rows == 1 || strides.row == shape.columns;
  return is_even && fits(shape.channels, strides.channel) && strides.column == 1 &&
         (rows_follow || (shape.columns % vec == 0 && strides.row % vec == 0));
}

}  // namespace

// The count for items of one element or of a vector, whichever is larger.
std::int64_t norm_partials(const NormShape& shape, DType dtype) {
  std::int64_t tiles = Walk(shape, 1).tiles;
  dispatch_narrow(dtype, [&](auto* type) {
    tiles = std::max<std::int64_t>(tiles, Walk(shape, vector_bytes / sizeof(*type)).tiles);
  });
  return shape.images * shape.channels * tiles * 3;
}

void channel_statistics_cuda(const void* x, double* statistics, float* partials, DType dtype, const NormShape& shape,
                             void* stream) {
  static_assert(sizeof(PartialStatistics) == 3 * sizeof(float), "norm_partials() counts floats");
  auto* of_tiles = reinterpret_cast<PartialStatistics*>(partials);
  dispatch_variant(dtype, shape, {x}, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Walk walk(shape, V::vec);
    launch("channel_statistics", statistics_kernel<T, V::vec, V::width>, walk.blocks, walk.threads, stream,
           static_cast<const T*>(x), of_tiles, walk);
    const std::int64_t pixels = V::vec / V::width;  // of an item
    launch("combine_statistics", combine_statistics_kernel, grid_size("norm_relu", shape.norms() * shape.channels),
           combine_threads, stream, of_tiles, statistics, walk.tile_items * pixels, walk.items * pixels,
           shape.norm_images(), static_cast<unsigned>(shape.channels), walk.tiles);
  });
}

void scale_shift_cuda(const void* x, const NormPointers& norm, const void* skip, void* out, DType dtype,
                      const NormShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                      void* stream) {
  dispatch_variant(dtype, shape, {x, out}, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::T;
    const Walk walk(shape, V::vec);
    const SkipView view{skip_strides, shape.columns, has_vectors(skip, shape, skip_strides, V::vec)};
    launch("scale_shift", scale_shift_kernel<T, V::vec, V::width>, walk.blocks, walk.threads, stream,
           static_cast<const T*>(x), norm, static_cast<const T*>(skip), static_cast<T*>(out), walk, view,
           shape.norm_step(), activation);
  });
}

void norm_from_statistics_cuda(const Statistics& of, const NormParameters& parameters, float* norm, std::int64_t images,
                               std::int64_t channels, void* stream) {
  for_each("norm_from_statistics", images * channels, NormFromStatistics{of, parameters, norm, images, channels, true},
           stream);
}

void update_running_statistics_cuda(const Statistics& of, double share, float* mean, float* variance,
                                    std::int64_t channels, void* stream) {
  for_each("update_running_statistics", channels, RunningStatistics{of, share, mean, variance, channels}, stream);
}

}  // namespace fastperc
