// The gradient of the weights of 3×3 convolutions by Winograd's F(2×2, 3×3), on the CPU. It is the convolution of
// conv3x3.cpp run backwards, with 16 products summed over the tiles.
//
//   the transforms of a tile and of its output's gradient   V = Bᵀ d B  [16, I],  W = A dy Aᵀ  [16, O]
//   16 products                                             dU = Σ Vᵀ · W  [16, I, O]
//   the gradient of the nine taps                           dg = Gᵀ dU G
//
// The number of threads does not change any sum or its order.
#include <algorithm>
#include <memory>

#include "conv3x3_tile.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t points = 16;

// The sums over a chunk of tiles, for a panel of input channels by a panel of output channels.
struct Partial {
  float products[points][panel][panel];  // dU
  float bias[panel];
};

// A task: a chunk of tiles, a panel of input channels and a panel of output channels.
struct WeightGradient {
  const float *x, *grad;
  WinogradShape shape;
  std::int64_t first, count;         // of the tiles
  std::int64_t first_in, first_out;  // of the channels
};

// to [16, step] = A dy Aᵀ of a tile, for a panel of output channels.
template <int lanes>
FASTPERC_INLINE void transform_gradient(const WeightGradient& task, std::int64_t tile, float* to, std::int64_t step) {
  const WinogradShape& s = task.shape;
  const Place p = place(s, tile);
  const bool has_below = p.row + 1 < s.out_rows(), has_right = p.column + 1 < s.out_columns();
  const float* from =
      task.grad + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out + task.first_out;
  const std::int64_t down = s.out_columns() * s.out;
  const Vector<lanes> zero = {};
  for (std::int64_t o = 0; o < panel; o += lanes) {
    const Vector<lanes> y[2][2] = {{at<lanes>(from + o), has_right ? at<lanes>(from + s.out + o) : zero},
                                   {has_below ? at<lanes>(from + down + o) : zero,
                                    has_below && has_right ? at<lanes>(from + down + s.out + o) : zero}};
    Vector<lanes> rows[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      rows[0][j] = y[0][j];
      rows[1][j] = y[0][j] + y[1][j];
      rows[2][j] = y[0][j] - y[1][j];
      rows[3][j] = zero - y[1][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = to + 4 * i * step + o;
      at<lanes>(row) = rows[i][0];
      at<lanes>(row + step) = rows[i][0] + rows[i][1];
      at<lanes>(row + 2 * step) = rows[i][0] - rows[i][1];
      at<lanes>(row + 3 * step) = zero - rows[i][1];
    }
  }
}

constexpr std::int64_t gradient_tiles = 32;  // transformed and summed at a time
constexpr std::int64_t gradient_step = gradient_tiles * panel + skew;

template <int lanes, int rows, int vectors>
FASTPERC_INLINE void add_up(const WeightGradient& task, Partial& partial, float* transformed) {
  constexpr std::int64_t step = gradient_step;
  float* gradients = transformed + points * step;
  std::fill(&partial.products[0][0][0], &partial.products[0][0][0] + points * panel * panel, 0.0f);
  std::fill(partial.bias, partial.bias + panel, 0.0f);
  for (std::int64_t done = 0; done < task.count; done += gradient_tiles) {
    const std::int64_t count = std::min(gradient_tiles, task.count - done);
    for (std::int64_t t = 0; t < count; ++t) {
      transform_tile<lanes, 2>(task.x, task.shape, task.first + done + t, task.first_in, panel, transformed + t * panel,
                               step, chunk);
      transform_gradient<lanes>(task, task.first + done + t, gradients + t * panel, step);
    }
    for (std::int64_t i = 0; i < points; ++i) {
      multiply_rows<lanes, rows, vectors, panel, true, false>(transformed + i * step, {1, panel, gradient_tiles, 0},
                                                              gradients + i * step, &partial.products[i][0][0], count,
                                                              panel);
    }
    const float* all_four = gradients + 5 * step;  // the sum over the four pixels of each tile
    for (std::int64_t o = 0; o < panel; o += lanes) {
      Vector<lanes> sum = {};
      for (std::int64_t t = 0; t < count; ++t) sum += at<lanes>(all_four + t * panel + o);
      at<lanes>(partial.bias + o) += sum;
    }
  }
}

// weight = Gᵀ dU G, for a panel of input channels by a panel of output channels.
template <int lanes>
FASTPERC_INLINE void finish_weights(const Partial& sum, float* weight, const WeightStrides& strides) {
  for (std::int64_t i = 0; i < panel; ++i) {
    for (std::int64_t o = 0; o < panel; o += lanes) {
      Vector<lanes> rows[3][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector<lanes> u0 = at<lanes>(&sum.products[j][i][o]), u1 = at<lanes>(&sum.products[4 + j][i][o]);
        const Vector<lanes> u2 = at<lanes>(&sum.products[8 + j][i][o]), u3 = at<lanes>(&sum.products[12 + j][i][o]);
        rows[0][j] = u0 + 0.5f * (u1 + u2);
        rows[1][j] = 0.5f * (u1 - u2);
        rows[2][j] = 0.5f * (u1 + u2) + u3;
      }
      float taps[9][lanes];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        at<lanes>(taps[3 * r]) = rows[r][0] + 0.5f * (rows[r][1] + rows[r][2]);
        at<lanes>(taps[3 * r + 1]) = 0.5f * (rows[r][1] - rows[r][2]);
        at<lanes>(taps[3 * r + 2]) = 0.5f * (rows[r][1] + rows[r][2]) + rows[r][3];
      }
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        float* to = weight + (o + lane) * strides.out + i * strides.in;
        for (int tap = 0; tap < 9; ++tap) to[tap / 3 * strides.row + tap % 3 * strides.column] = taps[tap][lane];
      }
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                           \
  attributes void gradient_chunk(const WeightGradient& task, Partial& partial, float* transformed) { \
    add_up<lanes, rows, vectors>(task, partial, transformed);                                        \
  }                                                                                                  \
  attributes void gradient_panel(const Partial& sum, float* weight, const WeightStrides& strides) {  \
    finish_weights<lanes>(sum, weight, strides);                                                     \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

}  // namespace

void winograd_weight_gradient_cpu(const float* x, const float* grad, float* weight, float* bias,
                                  const WinogradShape& shape, const WeightStrides& strides, int threads) {
  constexpr std::int64_t most_partials = 512;  // 33 MB
  const std::int64_t tiles = shape.tiles(), ins = shape.in / panel, outs = shape.out / panel;
  const std::int64_t most_chunks = std::clamp<std::int64_t>(most_partials / (ins * outs), 1, 8);
  const std::int64_t per_chunk = std::max<std::int64_t>((tiles + most_chunks - 1) / most_chunks, 1024);
  const std::int64_t chunks = std::max<std::int64_t>((tiles + per_chunk - 1) / per_chunk, 1);
  const std::unique_ptr<Partial[]> partials(new Partial[chunks * ins * outs]);  // [chunks, outs, ins]
  take_turns(chunks * outs * ins, threads, [&](std::int64_t task) {
    const std::int64_t first = task / (outs * ins) * per_chunk;
    const std::int64_t first_in = task % ins * panel, first_out = task / ins % outs * panel;
    gradient_chunk({x, grad, shape, first, std::min(per_chunk, tiles - first), first_in, first_out}, partials[task],
                   scratch(2 * points * gradient_step));
  });
  parallel_for(outs * ins, threads, [&](std::int64_t task) {
    Partial& sum = partials[task];
    constexpr std::int64_t floats = sizeof(Partial) / sizeof(float);
    float* to = reinterpret_cast<float*>(&sum);
    for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* from = reinterpret_cast<const float*>(&partials[chunk * outs * ins + task]);
      for (std::int64_t i = 0; i < floats; ++i) to[i] += from[i];
    }
    const std::int64_t first_in = task % ins * panel, first_out = task / ins * panel;
    gradient_panel(sum, weight + first_out * strides.out + first_in * strides.in, strides);
    if (bias && first_in == 0) std::copy(sum.bias, sum.bias + panel, bias + first_out);
  });
}

}  // namespace fastperc
