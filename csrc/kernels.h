// Every kernel launcher of the compiled module. Pointers are raw: to device memory where a stream is taken.
#pragma once

#include <cstdint>
#include <string>

#include "image_io.h"
#include "norm_relu.h"
#include "rgb_conv.h"
#include "tv_loss.h"
#include "vgg_loss.h"
#include "winograd.h"

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

// out [N, height, width, 3] = the window of image [N, 3, H, W] (uint8 or floating-point), times scale, plus shift.
void image_io_cpu(const void* image, void* out, const std::string& image_dtype, DType dtype, std::int64_t images,
                  const Window& window, const ImageStrides& strides, float scale, float shift, int threads);

// out [3, rows, width] (uint8 or floating-point) = the picture that products (see rgb_conv.h; float32 or bfloat16) and
// bias [3] make.
void rgb_conv_head_cpu(const void* products, const float* bias, void* out, DType dtype, const std::string& out_dtype,
                       Output output, const HeadShape& shape, const ImageStrides& out_strides, int threads);

// statistics [N, 2, C] = mean, and Σ (x - mean)², over the pixels of x [N, H, W, C].
void channel_statistics_cpu(const void* x, double* statistics, DType dtype, const ImageShape& shape, int threads);
// out [N, H, W, C] = relu?(x · scale [N, C] + shift [N, C] + skip); skip, if not null, has its channels side by side.
// out may be x.
void scale_shift_cpu(const void* x, const float* scale, const float* shift, const void* skip, void* out, DType dtype,
                     const ImageShape& shape, const ImageStrides& skip_strides, bool relu, int threads);

// Of out = relu?(x · scale + shift), scale and shift made of the norm's statistics: sums [N, 2, C] = Σ g, and
// Σ g · (x − mean), g being grad [N, H, W, C] where the ReLU was positive, else 0.
void norm_gradient_sums_cpu(const void* x, const void* grad, const NormPointers& norm, double* sums, DType dtype,
                            const ImageShape& shape, bool relu, int threads);
// out [N, H, W, C] = g · factors[:, 0] + (x − mean) · factors[:, 1] + factors[:, 2], factors being [N, 3, C].
void norm_gradient_cpu(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                       DType dtype, const ImageShape& shape, bool relu, int threads);

// The floats in a register that the three below compute with here.
int winograd_lanes();
// transformed [O / panel, 16, I, panel] = weight [O, I, 3, 3] as the next takes it (see winograd.h). Channels, there
// and below, are multiples of the panel.
void winograd_weights_cpu(const float* weight, float* transformed, std::int64_t in, std::int64_t out,
                          const WeightStrides& strides, int threads);
// out [N, H', W', O] = relu?(x [N, H, W, I] convolved with the transformed weights, plus bias [O] and skip, unless they
// are null); skip has its channels side by side.
void winograd_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                       const WinogradShape& shape, const ImageStrides& skip_strides, bool relu, int threads);
// weight [O, I, 3, 3] = the gradient to the weights, x and grad [N, H', W', O] given; bias [O], unless it is null, that
// to the bias.
void winograd_weight_gradient_cpu(const float* x, const float* grad, float* weight, float* bias,
                                  const WinogradShape& shape, const WeightStrides& strides, int threads);

}  // namespace fastperc
