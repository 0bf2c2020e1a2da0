// Every kernel launcher of the compiled module. Pointers are raw. Launchers that take a stream take device memory.
#pragma once

#include <cstdint>
#include <string>

#include "conv3x3.h"
#include "depthwise_conv.h"
#include "image_io.h"
#include "lpips_distance.h"
#include "norm_relu.h"
#include "pointwise_conv.h"
#include "rgb_conv.h"
#include "stem_conv.h"
#include "tv_loss.h"
#include "vgg_loss.h"

namespace fastperc {

// loss[0] = Σ variation over x. Unless grad is null, grad = dloss/dx, in the same pass.
// x, grad: rows as in RowShape, in `dtype`; loss: float64 for float64, else float32.
void tv_loss_fwd_cpu(const void* x, void* grad, void* loss, DType dtype, Norm norm, const RowShape& shape,
                     const RowStrides& x_strides, const RowStrides& grad_strides, int threads);

// The same on a GPU, where the module was built with nvcc. partials: scratch of tv_loss_partials(shape) elements of the
// loss's type.
std::int64_t tv_loss_partials(const RowShape& shape);
void tv_loss_fwd_cuda(const void* x, void* grad, void* loss, void* partials, DType dtype, Norm norm,
                      const RowShape& shape, const RowStrides& x_strides, const RowStrides& grad_strides, void* stream);

// Sets bit i % 8 of bits[i / 8] where x[i] > 0, for i < count.
void relu_mask_fwd_cpu(const void* x, void* bits, DType dtype, std::int64_t count, int threads);
// grad[i] = 0 where bit i is not set.
void relu_mask_bwd_cpu(void* grad, const void* bits, DType dtype, std::int64_t count, int threads);

// pooled [N, H/2, W/2, C] = the maxima of x [N, H, W, C] over 2×2 windows. winners [n, H/2, W/2, C], for the first n
// images, says which pixel of its window each maximum is (see vgg_loss.h).
void relu_pool_fwd_cpu(const void* x, void* pooled, void* winners, DType dtype, const ImageShape& shape,
                       std::int64_t images_with_winners, int threads);
// grad [N, H, W, C] = grad_pooled where a pixel is the winner of its window, else 0.
void relu_pool_bwd_cpu(const void* grad_pooled, const void* winners, void* grad, DType dtype, const ImageShape& shape,
                       int threads);

// Distances of two feature maps in `dtype`, and their gradients (see lpips_distance.h).
void lpips_distance_cpu(const LpipsTensors& tensors, DType dtype, const FeatureShape& shape, int threads);

// out [N, height, width, 3] = scale · image + shift, for the window of image [N, 3, H, W] (uint8 or floating-point).
void image_io_cpu(const void* image, void* out, const std::string& image_dtype, DType dtype, std::int64_t images,
                  const Window& window, const ImageStrides& strides, float scale, float shift, int threads);

// The same on a GPU, where the module was built with nvcc; out is not float64.
void image_io_cuda(const void* image, void* out, const std::string& image_dtype, DType dtype, std::int64_t images,
                   const Window& window, const ImageStrides& strides, float scale, float shift, void* stream);
// out [N, 3, H, W] (uint8 or floating-point) = the picture of y [N, 3, H, W] + bias [3], the last convolution's output,
// on a GPU. y is not float64.
void picture_cuda(const void* y, const float* bias, void* out, DType dtype, const std::string& out_dtype, Output output,
                  const PictureShape& shape, const ImageStrides& strides, const ImageStrides& out_strides,
                  void* stream);

// out [3, rows, width] (uint8 or floating-point) = the picture, made of products (float32 or bfloat16, see rgb_conv.h)
// and bias [3].
void rgb_conv_head_cpu(const void* products, const float* bias, void* out, DType dtype, const std::string& out_dtype,
                       Output output, const HeadShape& shape, const ImageStrides& out_strides, int threads);

// The ends of a frozen network by Winograd's algorithm (see rgb_conv_winograd.cpp), with a bias.
// out [N, H', W', O] = relu?(9×9 convolution of x [N, H, W, 3]); O is a multiple of 16. weights [O / p, 25, 27, p] for
// a panel p of 32 channels, or of 16 if O is no multiple of 32.
void rgb_conv_stem_winograd_cpu(const float* x, const float* weights, const float* bias, float* out,
                                const RGBConvShape& shape, bool relu, int threads);
// out [N, 3, H', W'] (uint8 or floating-point) = the picture that the 9×9 convolution of x [N, H, W, C] makes; C is a
// multiple of 16. weights [25, C, 32]: a column for each block of the kernel and each filter, 27, filled up with zeros.
void rgb_conv_head_winograd_cpu(const float* x, const float* weights, const float* bias, void* out,
                                const std::string& out_dtype, Output output, const RGBConvShape& shape,
                                const ImageStrides& out_strides, int threads);

// statistics [N, 2, C] = the mean and Σ (x − mean)² over the pixels of each image of x [N, H, W, C].
void channel_statistics_cpu(const void* x, double* statistics, DType dtype, const ImageShape& shape, int threads);
// out [N, H, W, C] = activation(x · scale [N, C] + shift [N, C] + skip). skip may be null; its channels have stride 1.
// out may be x.
void scale_shift_cpu(const void* x, const float* scale, const float* shift, const void* skip, void* out, DType dtype,
                     const ImageShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                     int threads);

// norm [3, N, C] = mean, scale and shift of a norm with these statistics.
void norm_from_statistics_cpu(const Statistics& statistics, const NormParameters& parameters, float* norm,
                              std::int64_t images, std::int64_t channels);
// Moves the running mean and variance [C] of a batch norm by `share` towards those of the statistics; a channel without
// values keeps its own.
void update_running_statistics_cpu(const Statistics& statistics, double share, float* mean, float* variance,
                                   std::int64_t channels);

// The sums that the backward of out = activation(x · scale + shift + skip) needs: sums [N, 2, C] = Σ g and
// Σ g · (x − mean), where g is grad [N, H, W, C] through the activation, and the mean that of statistics [N, 2, C],
// which has more digits than norm. With slopes there is a third row: the gradient of the slopes. It is right without a
// skip only.
void norm_gradient_sums_cpu(const void* x, const void* grad, const NormPointers& norm, const double* statistics,
                            double* sums, DType dtype, const ImageShape& shape, const Activation& activation,
                            const GradientExtras& extras, int threads);
// gradients [2 or 3, C], of weight, bias and slopes, from sums [N, rows, C]; rows is 2, or 3 with slopes.
void norm_parameter_gradients_cpu(const Statistics& statistics, double eps, const double* sums, std::int64_t rows,
                                  float* gradients, std::int64_t images, std::int64_t channels);
// factors [N, 3, C], for norm_gradient_cpu, from sums [N, rows, C] over all values that the statistics are of.
void norm_gradient_factors_cpu(const Statistics& statistics, const NormParameters& parameters, const double* sums,
                               std::int64_t rows, float* factors, std::int64_t images, std::int64_t channels);
// out [N, H, W, C] = g · factors[:, 0] + (x − mean) · factors[:, 1] + factors[:, 2], with factors [N, 3, C].
void norm_gradient_cpu(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                       DType dtype, const ImageShape& shape, const Activation& activation, int threads);

// The same on a GPU, where the module was built with nvcc, for activations dense in NCHW or NHWC. There a norm is one
// image's, or that of all images (NormShape), and N is the number of norms. partials: scratch of norm_partials(shape,
// dtype) elements. The norm of scale_shift_cuda may have null pointers, which are a mean of 0, a scale of 1 and a shift
// of 0. skip may have any strides.
std::int64_t norm_partials(const NormShape& shape, DType dtype);
void channel_statistics_cuda(const void* x, double* statistics, float* partials, DType dtype, const NormShape& shape,
                             void* stream);
void scale_shift_cuda(const void* x, const NormPointers& norm, const void* skip, void* out, DType dtype,
                      const NormShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                      void* stream);
void norm_from_statistics_cuda(const Statistics& statistics, const NormParameters& parameters, float* norm,
                               std::int64_t images, std::int64_t channels, void* stream);
void update_running_statistics_cuda(const Statistics& statistics, double share, float* mean, float* variance,
                                    std::int64_t channels, void* stream);
void norm_gradient_sums_cuda(const void* x, const void* grad, const NormPointers& norm, const double* statistics,
                             double* sums, float* partials, DType dtype, const NormShape& shape,
                             const Activation& activation, const GradientExtras& extras, void* stream);
void norm_parameter_gradients_cuda(const Statistics& statistics, double eps, const double* sums, std::int64_t rows,
                                   float* gradients, std::int64_t images, std::int64_t channels, void* stream);
void norm_gradient_factors_cuda(const Statistics& statistics, const NormParameters& parameters, const double* sums,
                                std::int64_t rows, float* factors, std::int64_t images, std::int64_t channels,
                                void* stream);
void norm_gradient_cuda(const void* x, const void* grad, const NormPointers& norm, const float* factors, void* out,
                        DType dtype, const NormShape& shape, const Activation& activation, void* stream);

// How many floats a vector register holds in the three launchers that follow, on this processor.
int winograd_lanes();
// transformed [O / panel, (tile + 2)², I, panel] = the transform of weight [O, I, 3, 3] (see conv3x3.h); tile is 2 or
// 4. The channels of all three launchers are multiples of the panel.
void winograd_weights_cpu(const float* weight, float* transformed, std::int64_t in, std::int64_t out,
                          const WeightStrides& strides, std::int64_t tile, int threads);
// out [N, H', W', O] = activation(x [N, H, W, I] convolved with the transformed weights + bias [O] + skip). bias and
// skip may be null; the channels of skip have stride 1. x and out may be different channels of one map.
void winograd_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                       const WinogradShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                       int threads);
// weight [O, I, 3, 3] = the gradient of the weights, made of x and grad [N, H', W', O], by tiles of 2×2. Unless bias
// [O] is null, it gets the gradient of the bias.
void winograd_weight_gradient_cpu(const float* x, const float* grad, float* weight, float* bias,
                                  const WinogradShape& shape, const WeightStrides& strides, int threads);

// How the weights of the launcher that follows are packed, on this processor.
PointwisePanels pointwise_panels();
// out [N, H', W', O] = activation(x [N, H, W, I] convolved with packed weights (see pointwise_conv.h) + bias + skip).
// skip may be null; its channels have stride 1. bias, and slopes of the activation, are filled up to a multiple of the
// lanes. x and out may be different channels of one map.
void pointwise_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                        const PointwiseShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                        int threads);

// out [N, H', W', C] = activation(depthwise convolution of x [N, H, W, C] + bias [C] + skip), with packed weights (see
// depthwise_conv.h). The kernel is 3, 5 or 7 wide, the stride 1 or 2. skip may be null; its channels have stride 1.
// bias, and slopes of the activation, are filled up to a multiple of a panel. x and out may be different channels of
// one map.
void depthwise_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                        const DepthwiseShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                        int threads);

// out [N, H', W', O] = activation(convolution of x [N, H, W, I] + bias [O] + skip), for few input channels, with packed
// weights (see stem_conv.h). skip may be null; its channels have stride 1. bias, and slopes of the activation, are
// filled up to a multiple of half a panel. x and out may be different channels of one map.
void stem_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                   const StemShape& shape, const ImageStrides& skip_strides, const Activation& activation, int threads);

}  // namespace fastperc
