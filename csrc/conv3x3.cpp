// 3×3 convolutions of stride 1 on the CPU, float32, NHWC, by Winograd's F(t×t, 3×3): for t = 2 it takes 4 products for
// an output where the definition takes 9, for t = 4 it takes 2.25, loses some digits, and wastes more at the border.
//
//   a tile: (t+2)×(t+2) pixels of x at every t-th row and column     d [t+2, t+2, I]
//   its transform                                                    V = Bᵀ d B  [(t+2)², I]
//   (t+2)² products with the transformed weights U = G g Gᵀ          M = V · U   [(t+2)², O]
//   t×t pixels of the output                                         y = Aᵀ M A  [t, t, O]
//
// A thread takes a block of tiles at a time, whose V stays in its L2 cache, and computes one panel of output channels
// after the other. So each panel of U is read once for a block. Bias, skip and activation are applied when the pixels
// of a tile are stored. The number of threads does not change any sum or its order.
#include "conv3x3.h"

#include <algorithm>

#include "conv3x3_tile.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t group = 8;               // tiles of a block that lie together in V and in M
constexpr std::int64_t block_floats = 3 << 16;  // the size of V of a block
constexpr std::int64_t fewest_tiles = 16;       // of a block; with fewer, U is read too often

struct Convolution {
  const float *x, *weights, *bias, *skip;  // transformed weights; bias [O] and skip [N, H', W', O] may be null
  float* out;
  WinogradShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;
  std::int64_t tiles;  // in a block, a multiple of `group`

  std::int64_t points() const { return (shape.tile + 2) * (shape.tile + 2); }
  // V [groups, I / chunk, points, group, chunk]
  std::int64_t chunk_step() const { return points() * group * chunk; }
  std::int64_t transformed_step() const { return shape.in / chunk * chunk_step(); }
  // M [groups, points, group, panel]
  std::int64_t point_step() const { return group * panel + skew; }
  std::int64_t product_step() const { return points() * point_step(); }
  std::int64_t floats() const { return tiles / group * (transformed_step() + product_step()); }
};

// Stores the pixels of a tile, made of M [(tile + 2)², step], for a panel of output channels from `first` on.
template <int lanes, int tile>
FASTPERC_INLINE void store_tile(const Convolution& conv, std::int64_t index, const float* m, std::int64_t step,
                                std::int64_t first) {
  constexpr int width = tile + 2;
  const WinogradShape& s = conv.shape;
  const Place p = place(s, index);
  const std::int64_t rows_inside = s.out_rows() - p.row, columns_inside = s.out_columns() - p.column;
  float* out = conv.out + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out_step + first;
  const std::int64_t down = s.out_columns() * s.out_step;
  const ImageStrides& strides = conv.skip_strides;
  const float* skip =
      conv.skip ? conv.skip + p.image * strides.image + p.row * strides.row + p.column * strides.column + first
                : nullptr;
  for (std::int64_t o = 0; o < panel; o += lanes) {
    Vector<lanes> rows[tile][width], products[width], pixels[tile];
#pragma GCC unroll 6
    for (int j = 0; j < width; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) products[i] = at<lanes>(m + (width * i + j) * step + o);
      Transform<tile>::output(products, pixels);
#pragma GCC unroll 4
      for (int i = 0; i < tile; ++i) rows[i][j] = pixels[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < tile; ++i) {
      if (i >= rows_inside) break;
      Transform<tile>::output(rows[i], pixels);
#pragma GCC unroll 4
      for (int j = 0; j < tile; ++j) {
        if (j >= columns_inside) break;
        if (conv.bias) pixels[j] += at<lanes>(conv.bias + first + o);
        if (skip) pixels[j] += at<lanes>(skip + i * strides.row + j * strides.column + o);
        activate<lanes>(pixels[j], conv.activation, first + o);
        at<lanes>(out + i * down + j * s.out_step + o) = pixels[j];
      }
    }
  }
}

// Computes the block of `count` tiles from `first` on.
template <int lanes, int rows, int vectors, int tile>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t first, std::int64_t count, float* transformed) {
  constexpr std::int64_t points = (tile + 2) * (tile + 2);
  const WinogradShape& s = conv.shape;
  const std::int64_t chunk_step = conv.chunk_step(), point_step = conv.point_step();
  float* products = transformed + conv.tiles / group * conv.transformed_step();
  const auto transform_of = [&](std::int64_t t) {
    return transformed + t / group * conv.transformed_step() + t % group * chunk;
  };
  for (std::int64_t t = 0; t < count; ++t) {
    transform_tile<lanes, tile>(conv.x, s, first + t, 0, s.in, transform_of(t), group * chunk, chunk_step);
  }
  for (std::int64_t t = count; t % 4; ++t) {
    for (std::int64_t i = 0; i < points * s.in / chunk; ++i) std::fill_n(transform_of(t) + i * group * chunk, chunk, 0);
  }
  for (std::int64_t o = 0; o < s.out; o += panel) {
    for (std::int64_t i = 0; i < points; ++i) {
      const float* weights = conv.weights + (o * points + i * panel) * s.in;
      for (std::int64_t t = 0; t < count; t += group) {
        multiply_rows<lanes, rows, vectors, panel, false, true>(
            transform_of(t) + i * group * chunk, {chunk, 1, chunk, chunk_step}, weights,
            products + t / group * conv.product_step() + i * point_step, s.in, std::min(group, (count - t + 3) / 4 * 4),
            weights + panel * s.in + t / group * s.in * line);
      }
    }
    for (std::int64_t t = 0; t < count; ++t) {
      store_tile<lanes, tile>(conv, first + t, products + t / group * conv.product_step() + t % group * panel,
                              point_step, o);
    }
  }
}

// to [(tile + 2)², in, panel] = U of a panel of output channels.
template <int lanes, int tile>
FASTPERC_INLINE void transform_weights(const float* weight, const WeightStrides& strides, std::int64_t in, float* to) {
  constexpr int width = tile + 2;
  float taps[9][lanes][panel];
  for (std::int64_t first = 0; first < in; first += lanes) {
    const auto tap_at = [&](int tap) FASTPERC_INLINE_LAMBDA {
      return weight + tap / 3 * strides.row + tap % 3 * strides.column + first * strides.in;
    };
    if (strides.in == 1 || strides.out == 1) {  // the innermost loop goes along the smallest stride
      for (int tap = 0; tap < 9; ++tap) {
        const float* from = tap_at(tap);
        if (strides.out == 1) {
          for (std::int64_t i = 0; i < lanes; ++i) std::copy_n(from + i * strides.in, panel, taps[tap][i]);
        } else {
          for (std::int64_t o = 0; o < panel; ++o) {
            FASTPERC_PREFETCH(from + o * strides.out + lanes);
            for (std::int64_t i = 0; i < lanes; ++i) taps[tap][i][o] = from[o * strides.out + i];
          }
        }
      }
    } else {
      for (std::int64_t o = 0; o < panel; ++o) {
        for (std::int64_t i = 0; i < lanes; ++i) {
          for (int tap = 0; tap < 9; ++tap) taps[tap][i][o] = tap_at(tap)[o * strides.out + i * strides.in];
        }
      }
    }
    for (std::int64_t i = 0; i < lanes; ++i) {
      for (std::int64_t o = 0; o < panel; o += lanes) {
        Vector<lanes> rows[width][3], made[width];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const Vector<lanes> column[3] = {at<lanes>(&taps[j][i][o]), at<lanes>(&taps[3 + j][i][o]),
                                           at<lanes>(&taps[6 + j][i][o])};
          Transform<tile>::weight(column, made);
#pragma GCC unroll 6
          for (int r = 0; r < width; ++r) rows[r][j] = made[r];
        }
#pragma GCC unroll 6
        for (int r = 0; r < width; ++r) {
          Transform<tile>::weight(rows[r], made);
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
            at<lanes>(to + ((width * r + c) * in + first + i) * panel + o) = made[c];
          }
        }
      }
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                     \
  attributes int floats_in_register() { return lanes; }                                                        \
  attributes void convolve_block(const Convolution& conv, std::int64_t first, std::int64_t count, float* to) { \
    if (conv.shape.tile == 2) {                                                                                \
      convolve<lanes, rows, vectors, 2>(conv, first, count, to);                                               \
    } else {                                                                                                   \
      convolve<lanes, rows, vectors, 4>(conv, first, count, to);                                               \
    }                                                                                                          \
  }                                                                                                            \
  attributes void weights_panel(const float* weight, const WeightStrides& strides, std::int64_t in, float* to, \
                                std::int64_t tile) {                                                           \
    if (tile == 2) {                                                                                           \
      transform_weights<lanes, 2>(weight, strides, in, to);                                                    \
    } else {                                                                                                   \
      transform_weights<lanes, 4>(weight, strides, in, to);                                                    \
    }                                                                                                          \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

}  // namespace

int winograd_lanes() { return floats_in_register(); }

void winograd_weights_cpu(const float* weight, float* transformed, std::int64_t in, std::int64_t out,
                          const WeightStrides& strides, std::int64_t tile, int threads) {
  const std::int64_t floats = (tile + 2) * (tile + 2) * in * panel;
  parallel_for(out / panel, threads, [&](std::int64_t p) {
    weights_panel(weight + p * panel * strides.out, strides, in, transformed + p * floats, tile);
  });
}

void winograd_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                       const WinogradShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                       int threads) {
  const std::int64_t tiles = shape.tiles();
  if (tiles == 0) return;
  const std::int64_t points = (shape.tile + 2) * (shape.tile + 2);
  const std::int64_t most = std::max(block_floats / (points * shape.in), fewest_tiles);
  const std::int64_t turns = (tiles + threads * most - 1) / (threads * most);  // blocks for each thread
  const std::int64_t share = std::max((tiles + threads * turns - 1) / (threads * turns), fewest_tiles);
  const std::int64_t per_block = (share + group - 1) / group * group;
  const Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation, per_block};
  take_turns((tiles + per_block - 1) / per_block, threads, [&](std::int64_t block) {
    const std::int64_t first = block * per_block;
    convolve_block(conv, first, std::min(per_block, tiles - first), scratch(conv.floats()));
  });
}

}  // namespace fastperc
