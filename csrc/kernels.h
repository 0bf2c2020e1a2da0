// Every kernel launcher of the compiled module. Pointers are raw: to device memory where a stream is taken.
#pragma once

#include <cstdint>

#include "tv_loss.h"

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

}  // namespace fastperc
