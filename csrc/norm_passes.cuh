// How CUDA kernels go over activations, in NCHW and NHWC, and add up their channels.
//
// A thread goes over items: vectors of 16 bytes where pointers, strides and sizes allow, else elements. In NCHW the
// items of a thread are of one channel. In NHWC a thread has the same channels of each of its pixels, so it loads the
// channels' factors once. A block has a tile of an image: some channels, and for each of them as many threads (lanes),
// which take its items in turns.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fastperc {

constexpr int most_threads = 256;                 // of a block
constexpr int most_units = 32;                    // of a block in NHWC: with vectors of 16 bytes, 512 adjacent bytes
constexpr int blocks_wanted = 1024;               // of a launch, before the tiles grow
constexpr int fewest_items = 4, most_items = 32;  // of a thread
constexpr int combine_threads = 128;              // of a block that has a channel

// How the blocks of a launch go over activations. A unit is what a thread has of the channels: one channel or, with
// vectors in NHWC, the channels of a vector. Steps are in elements.
struct Walk {
  std::int64_t channels, units, items;  // units of an image, items of a unit in an image
  std::int64_t image_step, unit_step, item_step;
  std::int64_t tile_items;  // of a unit
  unsigned tiles, unit_blocks, block_units, lanes, half_lanes, blocks, threads;

  Walk(const NormShape& shape, int vec) {
    const std::int64_t pixels = shape.rows * shape.columns;
    channels = shape.channels;
    image_step = channels * pixels;
    units = shape.channels_last ? channels / vec : channels;
    items = shape.channels_last ? pixels : pixels / vec;
    unit_step = shape.channels_last ? vec : pixels;
    item_step = shape.channels_last ? channels : vec;
    const std::int64_t all_unit_blocks = shape.channels_last ? ceil_div(units, most_units) : units;
    block_units = static_cast<unsigned>(all_unit_blocks ? ceil_div(units, all_unit_blocks) : 1);
    const std::int64_t enough_lanes = std::max<std::int64_t>(ceil_div(items, fewest_items), 1);
    lanes = static_cast<unsigned>(std::min<std::int64_t>(most_threads / block_units, enough_lanes));
    threads = static_cast<unsigned>(ceil_div(lanes * block_units, warp) * warp);
    half_lanes = 0;
    for (unsigned half = 1; half < lanes; half *= 2) half_lanes = half;
    const std::int64_t wanted = ceil_div(blocks_wanted, std::max<std::int64_t>(shape.images * all_unit_blocks, 1));
    const std::int64_t of_thread = ceil_div(ceil_div(items, lanes), wanted);
    tile_items = lanes * std::clamp<std::int64_t>(of_thread, fewest_items, most_items);
    const std::int64_t all_tiles = ceil_div(items, tile_items);
    blocks = grid_size("norm_relu", shape.images * all_unit_blocks * all_tiles);
    unit_blocks = static_cast<unsigned>(all_unit_blocks);
    tiles = static_cast<unsigned>(all_tiles);
  }
};

// The items of a thread.
struct Place {
  std::int64_t image, unit, first, end;
  unsigned tile, lane;
  bool active;  // whether it has a unit

  __device__ explicit Place(const Walk& walk) {
    const unsigned others = blockIdx.x / walk.tiles;
    tile = blockIdx.x % walk.tiles;
    image = others / walk.unit_blocks;
    unit = others % walk.unit_blocks * walk.block_units + threadIdx.x % walk.block_units;
    lane = threadIdx.x / walk.block_units;
    active = lane < walk.lanes && unit < walk.units;
    const std::int64_t begin = tile * walk.tile_items;
    end = active ? min(walk.items, begin + walk.tile_items) : 0;
    first = begin + lane;
  }
  // The first element of the first item.
  __device__ std::int64_t offset(const Walk& walk) const {
    return image * walk.image_step + unit * walk.unit_step + first * walk.item_step;
  }
};

// Calls use(item, offset, load(item, offset)) for the items of a thread. The offset is that of the item's first
// element. A few items are loaded before the first is used, to hide the latency of memory.
template <int at_once, typename Load, typename Use>
__device__ void for_each_item(const Walk& walk, const Place& place, Load&& load, Use&& use) {
  const std::int64_t step = walk.lanes * walk.item_step;
  std::int64_t offset = place.offset(walk);
  for (std::int64_t item = place.first; item < place.end; item += at_once * walk.lanes, offset += at_once * step) {
    decltype(load(item, offset)) loaded[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (item + k * walk.lanes < place.end) loaded[k] = load(item + k * walk.lanes, offset + k * step);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (item + k * walk.lanes < place.end) use(item + k * walk.lanes, offset + k * step, loaded[k]);
    }
  }
}

// Replaces each value by its sum over the lanes, in every thread. The order is fixed. All threads of the block call it.
template <int count>
__device__ void sum_over_lanes(float (&values)[count], const Walk& walk, unsigned lane) {
  __shared__ float sums[count][most_threads];
  __syncthreads();  // the threads have read the sums of an earlier call
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i][threadIdx.x] = values[i];
  for (unsigned half = walk.half_lanes; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half && lane + half < walk.lanes) {
#pragma unroll
      for (int i = 0; i < count; ++i) sums[i][threadIdx.x] += sums[i][threadIdx.x + half * walk.block_units];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = sums[i][threadIdx.x % walk.block_units];
}

// values [width] = those of a thread's channels, or `otherwise` if there is no array.
template <int width>
__device__ void load_factors(float (&values)[width], const float* ptr, std::int64_t offset, const Place& place,
                             float otherwise = 0.0f) {
#pragma unroll
  for (int j = 0; j < width; ++j) values[j] = ptr && place.active ? ptr[offset + place.unit * width + j] : otherwise;
}

// A norm's output, before the skip and the activation.
__device__ inline float normalised(float x, float mean, float scale, float shift) { return (x - mean) * scale + shift; }

// Calls f(i) for each i in [0, count).
template <typename F>
__global__ void for_each_kernel(F f, std::int64_t count) {
  const std::int64_t i = std::int64_t(blockIdx.x) * combine_threads + threadIdx.x;
  if (i < count) f(i);
}
template <typename F>
void for_each(const char* name, std::int64_t count, const F& f, void* stream) {
  const unsigned blocks = grid_size(name, ceil_div(count, combine_threads));
  launch(name, for_each_kernel<F>, blocks, combine_threads, stream, f, count);
}

template <typename Type, int elements, int channels_of_item>
struct Variant {
  using T = Type;
  static constexpr int vec = elements, width = channels_of_item;
};

// Calls f with the Variant of the kernels for these activations, which are dense at `pointers`, null ones left out.
template <typename F>
void dispatch_variant(DType dtype, const NormShape& shape, std::initializer_list<const void*> pointers, F&& f) {
  const std::int64_t length = shape.channels_last ? shape.channels : shape.rows * shape.columns;
  dispatch_narrow(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int wide = vector_bytes / sizeof(T);
    const bool are_aligned = std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
      return reinterpret_cast<std::uintptr_t>(pointer) % vector_bytes == 0;
    });
    if (!are_aligned || length % wide != 0) return f(Variant<T, 1, 1>());
    if (shape.channels_last) return f(Variant<T, wide, wide>());
    f(Variant<T, wide, 1>());
  });
}

}  // namespace fastperc
