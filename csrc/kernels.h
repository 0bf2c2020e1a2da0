// Every kernel launcher of the compiled module. Pointers are raw: to device memory where a stream is taken.
#pragma once

#include <cstdint>

#include "tv_loss.h"
#include "vgg_loss.h"

namespace fastperc {

// loss[0] = Σ variation over x, and grad = dloss/dx in the same pass unless it is null.
// x, grad: rows as in RowShape, in `dtype`; loss: float64 for float64, else float32.
void tv_loss_fwd_cpu(const void* x, void* grad, void* loss, DType dtype, Norm norm, const RowShape& shape,
                     const RowStrides& x_strides, const RowStrides& grad_strides, int threads);

// As above, on a GPU, built where nvcc is found. partials: scratch for tv_loss_partials(shape) elements of the loss's
// type.
std::int64_t tv_loss_partials(const RowShape& shape);
void tv_loss_fwd_cuda(const void* x, void* grad, void* loss, void* partials, DType dtype, Norm norm,
                      const RowShape& shape, const RowStrides& x_strides, const RowStrides& grad_strides, void* stream);

// bits[i / 8] has bit i % 8 set where x[i] > 0, for i < count.
void relu_mask_fwd_cpu(const void* x, void* bits, DType dtype, std::int64_t count, int threads);
// grad[i] = 0 where that bit is not set.
void relu_mask_bwd_cpu(void* grad, const void* bits, DType dtype, std::int64_t count, int threads);

// pooled [N, H/2, W/2, C] = the maxima of x [N, H, W, C] over 2×2 windows, and winners [n, H/2, W/2, C] which pixel
// each came from (see vgg_loss.h), for the first n images.
void relu_pool_fwd_cpu(const void* x, void* pooled, void* winners, DType dtype, const ImageShape& shape,
                       std::int64_t images_with_winners, int threads);
// grad [N, H, W, C] = grad_pooled where a pixel is its window's winner, else 0.
void relu_pool_bwd_cpu(const void* grad_pooled, const void* winners, void* grad, DType dtype, const ImageShape& shape,
                       int threads);

}  // namespace fastperc
