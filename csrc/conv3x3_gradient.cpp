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

// A task: a chunk of tiles, and a block of some panels of input channels by one or two of output channels. A block
// transforms each tile once for all its panels.
struct WeightGradient {
  const float *x, *grad;
  WinogradShape shape;
  std::int64_t first, count;                    // of the tiles
  std::int64_t first_in, ins, first_out, outs;  // of the channels

  // The sums of a block are products [points, ins, outs], dU, and bias [outs].
  std::int64_t floats() const { return (points * ins + 1) * outs; }
};

// to [16, step] = A dy Aᵀ of a tile, for the output channels of a block.
template <int lanes>
FASTPERC_INLINE void transform_gradient(const WeightGradient& task, std::int64_t tile, float* to, std::int64_t step) {
  const WinogradShape& s = task.shape;
  const Place p = place(s, tile);
  const bool has_below = p.row + 1 < s.out_rows(), has_right = p.column + 1 < s.out_columns();
  const float* from =
      task.grad + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out + task.first_out;
  const std::int64_t down = s.out_columns() * s.out;
  const Vector<lanes> zero = {};
  for (std::int64_t o = 0; o < task.outs; o += lanes) {
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

constexpr std::int64_t gradient_tiles = 32;                      // transformed and summed at a time
constexpr std::int64_t most_in_panels = 4, most_out_panels = 2;  // of a block, whose sums stay in the L2 cache

constexpr std::int64_t step_of(std::int64_t channels) { return gradient_tiles * channels + skew; }

template <int lanes, int rows, int vectors, int out_panels>
FASTPERC_INLINE void add_up(const WeightGradient& task, float* sums, float* transformed) {
  constexpr std::int64_t outs = out_panels * panel, out_step = step_of(outs);
  const std::int64_t ins = task.ins, in_step = step_of(ins);
  float *gradients = transformed + points * in_step, *bias = sums + points * ins * outs;
  std::fill(sums, sums + task.floats(), 0.0f);
  for (std::int64_t done = 0; done < task.count; done += gradient_tiles) {
    const std::int64_t count = std::min(gradient_tiles, task.count - done);
    for (std::int64_t t = 0; t < count; ++t) {
      transform_tile<lanes, 2>(task.x, task.shape, task.first + done + t, task.first_in, ins, transformed + t * ins,
                               in_step, chunk);
      transform_gradient<lanes>(task, task.first + done + t, gradients + t * outs, out_step);
    }
    for (std::int64_t i = 0; i < points; ++i) {
      multiply_rows<lanes, rows, vectors, outs, true, false>(transformed + i * in_step, {1, ins, gradient_tiles, 0},
                                                             gradients + i * out_step, sums + i * ins * outs, count,
                                                             ins);
    }
    const float* all_four = gradients + 5 * out_step;  // the sum over the four pixels of each tile
    for (std::int64_t o = 0; o < outs; o += lanes) {
      Vector<lanes> sum = {};
      for (std::int64_t t = 0; t < count; ++t) sum += at<lanes>(all_four + t * outs + o);
      at<lanes>(bias + o) += sum;
    }
  }
}

// weight = Gᵀ dU G, for a block, from its sums.
template <int lanes>
FASTPERC_INLINE void finish_weights(const WeightGradient& task, const float* sums, float* weight,
                                    const WeightStrides& strides) {
  const std::int64_t plane = task.ins * task.outs;
  float taps[9][lanes][panel];  // of some output channels by a panel of input channels
  for (std::int64_t first = 0; first < task.ins; first += panel) {
    for (std::int64_t o = 0; o < task.outs; o += lanes) {
      for (std::int64_t i = 0; i < panel; ++i) {
        const float* u = sums + (first + i) * task.outs + o;
        Vector<lanes> rows[3][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Vector<lanes> u0 = at<lanes>(u + j * plane), u1 = at<lanes>(u + (4 + j) * plane);
          const Vector<lanes> u2 = at<lanes>(u + (8 + j) * plane), u3 = at<lanes>(u + (12 + j) * plane);
          rows[0][j] = u0 + 0.5f * (u1 + u2);
          rows[1][j] = 0.5f * (u1 - u2);
          rows[2][j] = 0.5f * (u1 + u2) + u3;
        }
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const Vector<lanes> made[3] = {rows[r][0] + 0.5f * (rows[r][1] + rows[r][2]),
                                         0.5f * (rows[r][1] - rows[r][2]),
                                         0.5f * (rows[r][1] + rows[r][2]) + rows[r][3]};
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) {
            float values[lanes];
            at<lanes>(values) = made[c];
            for (int lane = 0; lane < lanes; ++lane) taps[3 * r + c][lane][i] = values[lane];
          }
        }
      }
      for (std::int64_t lane = 0; lane < lanes; ++lane) {  // along the smaller strides, those of taps or of channels
        float* to = weight + (task.first_out + o + lane) * strides.out + (task.first_in + first) * strides.in;
        if (strides.in == 1) {
          for (int tap = 0; tap < 9; ++tap) {
            std::copy_n(taps[tap][lane], panel, to + tap / 3 * strides.row + tap % 3 * strides.column);
          }
        } else {
          for (std::int64_t i = 0; i < panel; ++i) {
            for (int tap = 0; tap < 9; ++tap) {
              to[i * strides.in + tap / 3 * strides.row + tap % 3 * strides.column] = taps[tap][lane][i];
            }
          }
        }
      }
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                      \
  attributes void gradient_chunk(const WeightGradient& task, float* sums, float* transformed) { \
    if (task.outs == panel) {                                                                   \
      add_up<lanes, rows, vectors, 1>(task, sums, transformed);                                 \
    } else {                                                                                    \
      add_up<lanes, rows, vectors, 2>(task, sums, transformed);                                 \
    }                                                                                           \
  }                                                                                             \
  attributes void gradient_block(const WeightGradient& task, const float* sums, float* weight,  \
                                 const WeightStrides& strides) {                                \
    finish_weights<lanes>(task, sums, weight, strides);                                         \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

// The blocks of a gradient: some panels of input channels by some of output channels.
struct Blocks {
  std::int64_t in_panels, out_panels, down, across;

  Blocks(const WinogradShape& shape, std::int64_t chunks, int threads)
      : in_panels(shape.in / panel), out_panels(shape.out / panel) {
    across = (out_panels + most_out_panels - 1) / most_out_panels;
    std::int64_t most = most_in_panels;  // fewer, where several threads would have less than two blocks each
    while (most > 1 && (in_panels + most - 1) / most * across * chunks < 2 * threads) most /= 2;
    down = (in_panels + most - 1) / most;
  }
  std::int64_t count() const { return down * across; }

  // A block of equal shares, in channels.
  void place(std::int64_t block, WeightGradient& task) const {
    const std::int64_t row = block % down, column = block / down;
    task.first_in = row * in_panels / down * panel;
    task.ins = (row + 1) * in_panels / down * panel - task.first_in;
    task.first_out = column * out_panels / across * panel;
    task.outs = (column + 1) * out_panels / across * panel - task.first_out;
  }
};

}  // namespace

void winograd_weight_gradient_cpu(const float* x, const float* grad, float* weight, float* bias,
                                  const WinogradShape& shape, const WeightStrides& strides, int threads) {
  constexpr std::int64_t most_sums = 128;  // of a panel by a panel, 8 MB
  const std::int64_t tiles = shape.tiles(), panels = shape.in / panel * (shape.out / panel);
  const std::int64_t most_chunks = std::clamp<std::int64_t>(most_sums / panels, 1, 8);
  const std::int64_t per_chunk = std::max<std::int64_t>((tiles + most_chunks - 1) / most_chunks, 1024);
  const std::int64_t chunks = std::max<std::int64_t>((tiles + per_chunk - 1) / per_chunk, 1);
  const Blocks blocks(shape, chunks, threads);
  const auto task_of = [&](std::int64_t block, std::int64_t index) {
    const std::int64_t first = index * per_chunk;
    WeightGradient task{x, grad, shape, first, std::min(per_chunk, tiles - first), 0, 0, 0, 0};
    blocks.place(block, task);
    return task;
  };
  const auto finish = [&](const WeightGradient& task, const float* sums) {
    gradient_block(task, sums, weight, strides);
    const float* of_bias = sums + points * task.ins * task.outs;
    if (bias && task.first_in == 0) std::copy_n(of_bias, task.outs, bias + task.first_out);
  };
  constexpr std::int64_t most_in = most_in_panels * panel, most_out = most_out_panels * panel;
  constexpr std::int64_t most_floats = (points * most_in + 1) * most_out;
  constexpr std::int64_t most_transformed = points * (step_of(most_in) + step_of(most_out));
  if (chunks == 1) {
    take_turns(blocks.count(), threads, [&](std::int64_t block) {
      const WeightGradient task = task_of(block, 0);
      float* sums = scratch(most_floats + most_transformed);
      gradient_chunk(task, sums, sums + most_floats);
      finish(task, sums);
    });
    return;
  }
  const std::unique_ptr<float[]> all_sums(new float[chunks * blocks.count() * most_floats]);
  const auto sums_of = [&](std::int64_t block, std::int64_t index) {
    return all_sums.get() + (index * blocks.count() + block) * most_floats;
  };
  take_turns(chunks * blocks.count(), threads, [&](std::int64_t i) {
    const std::int64_t block = i % blocks.count(), index = i / blocks.count();
    gradient_chunk(task_of(block, index), sums_of(block, index), scratch(most_transformed));
  });
  parallel_for(blocks.count(), threads, [&](std::int64_t block) {
    const WeightGradient task = task_of(block, 0);
    float* to = sums_of(block, 0);
    for (std::int64_t index = 1; index < chunks; ++index) {
      const float* from = sums_of(block, index);
      for (std::int64_t i = 0; i < task.floats(); ++i) to[i] += from[i];
    }
    finish(task, to);
  });
}

}  // namespace fastperc
