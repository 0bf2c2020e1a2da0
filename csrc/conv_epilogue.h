// What follows the sums of a convolution: a skip, an activation, and their way to memory, also in parts of a register.
#pragma once

#include "conv3x3_tile.h"

namespace fastperc::winograd {

// Stores the first `count` floats of x, fewer than a register holds.
template <int lanes>
FASTPERC_INLINE void store_part(const Vector<lanes>& x, float* to, std::int64_t count) {
  const float* from = reinterpret_cast<const float*>(&x);
  if constexpr (lanes > 8) {
    if (count & 8) {
      at<8>(to) = at<8>(from);
      to += 8, from += 8;
    }
  }
  if constexpr (lanes > 4) {
    if (count & 4) {
      at<4>(to) = at<4>(from);
      to += 4, from += 4;
    }
  }
  for (std::int64_t i = 0; i < count % 4; ++i) to[i] = from[i];
}

// Adds `count` floats, fewer than a register holds.
template <int lanes>
FASTPERC_INLINE void add_part(Vector<lanes>& x, const float* from, std::int64_t count) {
  float part[lanes] = {};
  std::copy_n(from, count, part);
  x += at<lanes>(part);
}

// Each of the sums after the activation; vector v of a pixel has the channels from `channel` + v · lanes on.
template <int lanes, int pixels, int vectors>
FASTPERC_INLINE void activate_all(Vector<lanes> (&sums)[pixels][vectors], const Activation& activation,
                                  std::int64_t channel) {
  const auto each = [&](auto&& function) FASTPERC_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p) function(sums[p][v], v);
    }
  };
  switch (activation.kind) {
    case ActivationKind::none:
      break;
    case ActivationKind::relu:
      each([](Vector<lanes>& x, int) FASTPERC_INLINE_LAMBDA { relu(x); });
      break;
    case ActivationKind::slopes: {
      const float* slopes = activation.slopes + channel;
      each([&](Vector<lanes>& x, int v) FASTPERC_INLINE_LAMBDA { leaky(x, at<lanes>(slopes + v * lanes)); });
      break;
    }
    case ActivationKind::relu6:
      each([](Vector<lanes>& x, int) FASTPERC_INLINE_LAMBDA { relu6(x); });
      break;
  }
}

// out = activation(sums + skip), for adjacent pixels of a row. Of the channels of a pixel `valid` exist. skip may be
// null; the steps are those of pixels.
template <int lanes, int pixels, int vectors>
FASTPERC_INLINE void finish(Vector<lanes> (&sums)[pixels][vectors], const float* skip, std::int64_t skip_step,
                            float* out, std::int64_t out_step, const Activation& activation, std::int64_t channel,
                            std::int64_t valid) {
  if (skip) {
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const float* from = skip + p * skip_step + v * lanes;
        if ((v + 1) * lanes <= valid) {
          sums[p][v] += at<lanes>(from);
        } else if (v * lanes < valid) {
          add_part<lanes>(sums[p][v], from, valid - v * lanes);
        }
      }
    }
  }
  activate_all<lanes, pixels, vectors>(sums, activation, channel);
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = out + p * out_step + v * lanes;
      if ((v + 1) * lanes <= valid) {
        at<lanes>(to) = sums[p][v];
      } else if (v * lanes < valid) {
        store_part<lanes>(sums[p][v], to, valid - v * lanes);
      }
    }
  }
}

}  // namespace fastperc::winograd
