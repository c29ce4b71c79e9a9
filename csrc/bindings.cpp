// The one file that knows torch: registers the ops stvit_cuda::*, and is the Python module stvit._C.
//
// The ops have the signatures of the functions in kernels/sampling.py and kernels/upsampling.py. They have no autograd of
// their own: stvit/backends/ops.py calls them below its own ops, whose fakes and autograd all backends share. From C++ they are
// called through the dispatcher, c10::Dispatcher::singleton().findSchemaOrThrow("stvit_cuda::sampling", "").
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

#ifndef STVIT_DISPATCH_KEY
#define STVIT_DISPATCH_KEY CUDA
#endif
#define STVIT_TEXT_(name) #name
#define STVIT_TEXT(name) STVIT_TEXT_(name)

namespace stvit {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return Type::half;
    case at::kBFloat16: return Type::bfloat16;
    case at::kFloat: return Type::single;
    case at::kDouble: return Type::twofold;
    default: TORCH_CHECK_TYPE(false, "expected float16, bfloat16, float32 or float64, got ", c10::toString(type));
  }
}

View view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }
const void* data(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }
void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Channels next to each other, by strides alone, so that slices of a channels_last tensor count too.
bool is_channels_last(const Tensor& x) { return x.stride(1) == 1 && x.stride(3) != 1; }

Shape shape_of(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t h, int64_t w) {
  constexpr int64_t most = 1 << 30;
  TORCH_CHECK_VALUE(h > 0 && w > 0 && h <= most / w, "h, w: expected a tile of 1 to 2^30 pixels, got ", h, " x ", w);
  TORCH_CHECK_VALUE(channels > 0 && height > 0 && width > 0 && height < most && width < most,
                    "expected at least one channel, row and column, and fewer than 2^30 rows and columns, got ",
                    channels, " channels of ", height, " x ", width);
  const auto up = [](int64_t n, int64_t by) { return int((n + by - 1) / by); };
  return {batch, channels, height, width, int(h), int(w), up(height, h), up(width, w)};
}
Shape shape_of(const Tensor& pixels, int64_t h, int64_t w) {
  TORCH_CHECK_VALUE(pixels.dim() == 4, "expected pixels (B, C, H, W), got ", pixels.dim(), " dimensions");
  return shape_of(pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3), h, w);
}

// Of super tokens and the weights of pixels.
Shape shape_for(const Tensor& stokens, const Tensor& weights, int64_t h, int64_t w) {
  TORCH_CHECK_VALUE(stokens.dim() == 4, "expected super tokens (B, C, gh, gw), got ", stokens.dim(), " dimensions");
  TORCH_CHECK_VALUE(weights.dim() == 4, "weights: expected (B, 9, H, W), got ", weights.dim(), " dimensions");
  return shape_of(stokens.size(0), stokens.size(1), weights.size(2), weights.size(3), h, w);
}

Tensor empty_image(const Tensor& like, int64_t channels, int64_t rows, int64_t columns, bool channels_last,
                   std::optional<at::ScalarType> type = {}) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return at::empty({like.size(0), channels, rows, columns},
                   like.options().dtype(type.value_or(like.scalar_type())).memory_format(format));
}
Tensor empty_weights(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(3), 9}, x.options()).permute({0, 3, 1, 2});
}
// Weights (B, 9, H, W) with memory (B, H, W, 9), copied only where someone else made them otherwise.
Tensor by_pixel(const Tensor& weights) { return weights.permute({0, 2, 3, 1}).contiguous().permute({0, 3, 1, 2}); }

// Kernels trust their arguments: this is what they rely on.
void expect(const char* name, const Tensor& given, const Tensor& like, at::IntArrayRef sizes,
            std::optional<at::ScalarType> type = {}) {
  TORCH_CHECK_VALUE(given.sizes() == sizes, name, ": expected the shape ", sizes, ", got ", given.sizes());
  const auto wanted = type.value_or(like.scalar_type());
  TORCH_CHECK_TYPE(given.scalar_type() == wanted, name, ": expected ", wanted, ", got ", given.scalar_type());
  TORCH_CHECK_VALUE(given.device() == like.device(), name, ": expected it on ", like.device(), ", got ",
                    given.device());
}
at::ScalarType sum_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
void expect_weights(const Tensor& weights, const Tensor& like, const Shape& shape) {
  expect("weights", weights, like, {shape.batch, 9, shape.height, shape.width});
}
void expect_stokens(const char* name, const Tensor& stokens, const Tensor& like, const Shape& shape) {
  expect(name, stokens, like, {shape.batch, shape.channels, shape.gh, shape.gw});
}
void expect_mass(const Tensor& mass, const Tensor& like, const Shape& shape) {
  expect("mass", mass, like, {shape.batch, 1, shape.gh, shape.gw}, sum_type(like));
  TORCH_CHECK_VALUE(mass.is_contiguous(), "mass: expected it contiguous");
}

// --- Super token sampling ---

using Sampled = std::tuple<Tensor, Tensor, Tensor>;  // stokens, weights, mass

// One round. Without tokens the means over the tiles are pooled, and left in `pooled`.
Sampled sample(const Tensor& x, const Tensor* tokens, Tensor& pooled, const Shape& shape, double scale) {
  Tensor stokens = empty_image(x, shape.channels, shape.gh, shape.gw, is_channels_last(x));
  Tensor weights = empty_weights(x);
  Tensor mass = at::empty({shape.batch, 1, shape.gh, shape.gw}, x.options().dtype(sum_type(x)));
  Tensor padding;  // lives until the launch; the caching allocator then keeps it for this stream
  PixelsToTokens call{type_of(x.scalar_type()), shape, Map::associate, scale, view(x)};
  if (tokens) call.tokens = view(*tokens);
  if (!tokens) call.pooled = pooled.data_ptr();
  if (shape.height % shape.h || shape.width % shape.w) {
    padding = at::empty({shape.batch, shape.gh, shape.gw}, x.options());
    call.padding = padding.data_ptr();
  }
  call.mass = mass.data_ptr();
  call.out = weights.data_ptr();
  call.stokens = view(stokens);
  pixels_to_tokens(call, stream());
  return {stokens, weights, mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampling(const Tensor& x, int64_t h, int64_t w, int64_t n_iter,
                                                    double scale) {
  const CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(n_iter > 0, "n_iter: expected at least 1, got ", n_iter);
  const Shape shape = shape_of(x, h, w);
  Tensor pooled = at::empty({shape.batch, shape.gh, shape.gw, shape.channels}, x.options());
  auto [stokens, weights, mass] = sample(x, nullptr, pooled, shape, scale);
  for (int64_t i = 1; i < n_iter; ++i) {
    const Tensor tokens = stokens;
    std::tie(stokens, weights, mass) = sample(x, &tokens, pooled, shape, scale);
  }
  return {stokens, weights, mass, pooled};
}

// dx = A (D^-1 dS), the association held constant.
Tensor sampling_backward(const Tensor& grad_stokens, const Tensor& weights, const Tensor& mass, int64_t h, int64_t w,
                         bool channels_last) {
  const CUDAGuard guard(grad_stokens.device());
  const Shape shape = shape_for(grad_stokens, weights, h, w);
  expect_stokens("grad_stokens", grad_stokens, grad_stokens, shape);
  expect_weights(weights, grad_stokens, shape);
  expect_mass(mass, grad_stokens, shape);
  const Tensor given = by_pixel(weights);
  Tensor grad_x = empty_image(grad_stokens, shape.channels, shape.height, shape.width, channels_last);
  TokensToPixels call{type_of(grad_stokens.scalar_type()), shape, view(grad_stokens), given.data_ptr()};
  call.mass = mass.data_ptr();
  call.pixels = view(grad_x);
  call.pixels_type = call.type;
  tokens_to_pixels(call, stream());
  return grad_x;
}

// The backward of one round: the gradient of its pixels, and in `grad` that of the super tokens it began with in place
// of that of those it made. The gradient of pooling is added where `pools`.
Tensor differentiate(const Tensor& x, const Tensor& tokens, const Sampled& sampled, Tensor& grad,
                     const std::optional<Tensor>& grad_weights, const Shape& shape, double scale, bool pools) {
  const auto& [stokens, weights, mass] = sampled;
  const Tensor dlogit = empty_weights(x), grad_tokens = at::empty_like(tokens);
  const Tensor offset =
      grad.to(mass.scalar_type()).mul(stokens).sum({1}, true).div(mass.add(MASS_EPSILON)).contiguous();
  PixelsToTokens call{type_of(x.scalar_type()), shape, Map::differentiate, scale, view(x), view(grad)};
  call.weights = weights.data_ptr();
  call.grad = data(grad_weights);
  call.offset = offset.data_ptr();
  call.mass = mass.data_ptr();
  call.out = dlogit.data_ptr();
  call.stokens = view(grad_tokens);
  pixels_to_tokens(call, stream());

  const Tensor means = pools ? grad_tokens.permute({0, 2, 3, 1}).contiguous() : Tensor();
  Tensor grad_x = empty_image(x, shape.channels, shape.height, shape.width, is_channels_last(x));
  TokensToPixels back{call.type,       shape,        view(grad),        weights.data_ptr(),
                      mass.data_ptr(), view(tokens), dlogit.data_ptr(), scale};
  if (pools) back.means = means.data_ptr();
  back.pixels = view(grad_x);
  back.pixels_type = back.type;
  tokens_to_pixels(back, stream());
  grad = grad_tokens;
  return grad_x;
}

// The true gradient: through every round of association and sampling, and the pooling. Rounds before the last are
// computed again from `pooled` rather than saved.
Tensor sampling_backward_full(const std::optional<Tensor>& grad_stokens, const std::optional<Tensor>& grad_weights,
                              const Tensor& x, const Tensor& stokens, const Tensor& pooled, const Tensor& weights,
                              const Tensor& mass, int64_t h, int64_t w, int64_t n_iter, double scale) {
  const CUDAGuard guard(x.device());
  const Shape shape = shape_of(x, h, w);
  if (grad_stokens) expect_stokens("grad_stokens", *grad_stokens, x, shape);
  if (grad_weights) expect_weights(*grad_weights, x, shape);
  expect_stokens("stokens", stokens, x, shape);
  expect("pooled", pooled, x, {shape.batch, shape.gh, shape.gw, shape.channels});
  expect_weights(weights, x, shape);
  expect_mass(mass, x, shape);
  Tensor unused;
  std::vector<Tensor> rounds{pooled.permute({0, 3, 1, 2})};
  std::vector<Sampled> saved;
  for (int64_t i = 1; i < n_iter; ++i) {
    saved.push_back(sample(x, &rounds.back(), unused, shape, scale));
    rounds.push_back(std::get<0>(saved.back()));
  }
  saved.emplace_back(stokens, by_pixel(weights), mass);
  Tensor grad = grad_stokens ? *grad_stokens : at::zeros_like(stokens);
  std::optional<Tensor> by_weights = grad_weights ? std::optional(by_pixel(*grad_weights)) : std::nullopt;
  Tensor grad_x;
  for (int64_t i = n_iter - 1; i >= 0; --i) {
    const Tensor part = differentiate(x, rounds[i], saved[i], grad, by_weights, shape, scale, i == 0);
    grad_x = grad_x.defined() ? grad_x.add_(part) : part;
    by_weights = std::nullopt;
  }
  return grad_x;
}

// --- Token upsampling ---

// y = A S', plus the residual.
Tensor upsampling(const Tensor& stokens, const Tensor& weights, int64_t h, int64_t w, bool channels_last,
                  const std::optional<Tensor>& residual) {
  const CUDAGuard guard(stokens.device());
  const Shape shape = shape_for(stokens, weights, h, w);
  expect_stokens("stokens", stokens, stokens, shape);
  expect_weights(weights, stokens, shape);
  if (residual)
    expect("residual", *residual, stokens, {shape.batch, shape.channels, shape.height, shape.width},
           residual->scalar_type());
  const auto type = residual ? at::result_type(stokens, *residual) : stokens.scalar_type();
  const Tensor given = by_pixel(weights);
  Tensor y = empty_image(stokens, shape.channels, shape.height, shape.width, channels_last, type);
  TokensToPixels call{type_of(stokens.scalar_type()), shape, view(stokens), given.data_ptr()};
  if (residual) {
    call.residual = view(*residual);
    call.residual_type = type_of(residual->scalar_type());
  }
  call.pixels = view(y);
  call.pixels_type = type_of(type);
  tokens_to_pixels(call, stream());
  return y;
}

// dS' = A^T dy, the association held constant.
Tensor upsampling_backward(const Tensor& grad_y, const Tensor& weights, int64_t h, int64_t w, bool channels_last) {
  const CUDAGuard guard(grad_y.device());
  const Shape shape = shape_of(grad_y, h, w);
  expect_weights(weights, grad_y, shape);
  const Tensor given = by_pixel(weights);
  Tensor grad_stokens = empty_image(grad_y, shape.channels, shape.gh, shape.gw, channels_last);
  PixelsToTokens call{type_of(grad_y.scalar_type()), shape, Map::weighted, 1, view(grad_y)};
  call.weights = given.data_ptr();
  call.stokens = view(grad_stokens);
  pixels_to_tokens(call, stream());
  return grad_stokens;
}

// dS' = A^T dy and dA = dy . S' at the pattern.
std::tuple<Tensor, Tensor> upsampling_backward_full(const Tensor& grad_y, const Tensor& stokens, const Tensor& weights,
                                                    int64_t h, int64_t w) {
  const CUDAGuard guard(grad_y.device());
  const Shape shape = shape_of(grad_y, h, w);
  expect_stokens("stokens", stokens, grad_y, shape);
  expect_weights(weights, grad_y, shape);
  const Tensor given = by_pixel(weights);
  Tensor grad_stokens = empty_image(stokens, shape.channels, shape.gh, shape.gw, is_channels_last(stokens));
  Tensor grad_weights = empty_weights(grad_y);
  PixelsToTokens call{type_of(grad_y.scalar_type()), shape, Map::products, 1, view(grad_y), view(stokens)};
  call.weights = given.data_ptr();
  call.out = grad_weights.data_ptr();
  call.stokens = view(grad_stokens);
  pixels_to_tokens(call, stream());
  return {grad_stokens, grad_weights};
}

// --- What Python asks ---

pybind11::dict build_info() {
  pybind11::dict info;
  info["nvcc"] = STVIT_BUILD_NVCC;
  info["torch"] = STVIT_BUILD_TORCH;
  info["architectures"] = STVIT_BUILD_ARCHITECTURES;
  info["flags"] = STVIT_BUILD_FLAGS;
  info["device"] = std::string(STVIT_TEXT(STVIT_DISPATCH_KEY)) == "CUDA" ? "cuda" : "cpu";
  return info;
}

// How pixels (B, C, H, W) in channels_last, 2-byte numbers or wider, go to super tokens. map: 0 associate, 1 weighted, 2
// products, 3 differentiate (plan.h).
pybind11::dict plan_of(int map, bool pool, bool grad, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t h, int64_t w, int element_size, int multiprocessors, int shared_bytes) {
  const Task task{Map(map), pool, grad, element_size <= 4, element_size};
  const Walk walk = plan(task, shape_of(batch, channels, height, width, h, w), {multiprocessors, shared_bytes});
  pybind11::dict found;
  found["fits"] = walk.fits;
  found["pools"] = walk.pools;
  found["rows"] = walk.rows;
  found["columns"] = walk.columns;
  found["group"] = walk.group;
  found["ahead"] = walk.ahead;
  found["stages"] = walk.stages;
  found["regions"] = walk.regions;
  found["reads"] = walk.reads;
  found["shared_bytes"] = walk.shared_bytes;
  return found;
}

}  // namespace
}  // namespace stvit

TORCH_LIBRARY(stvit_cuda, m) {
  m.def(
      "sampling(Tensor x, int h, int w, int n_iter, float scale)"
      " -> (Tensor stokens, Tensor weights, Tensor mass, Tensor pooled)");
  m.def(
      "sampling_backward(Tensor grad_stokens, Tensor weights, Tensor mass, int h, int w, bool channels_last)"
      " -> Tensor grad_x");
  m.def(
      "sampling_backward_full(Tensor? grad_stokens, Tensor? grad_weights, Tensor x, Tensor stokens, Tensor pooled,"
      " Tensor weights, Tensor mass, int h, int w, int n_iter, float scale) -> Tensor grad_x");
  m.def(
      "upsampling(Tensor stokens, Tensor weights, int h, int w, bool channels_last, Tensor? residual=None)"
      " -> Tensor y");
  m.def("upsampling_backward(Tensor grad_y, Tensor weights, int h, int w, bool channels_last) -> Tensor grad_stokens");
  m.def(
      "upsampling_backward_full(Tensor grad_y, Tensor stokens, Tensor weights, int h, int w)"
      " -> (Tensor grad_stokens, Tensor grad_weights)");
}

TORCH_LIBRARY_IMPL(stvit_cuda, STVIT_DISPATCH_KEY, m) {
  m.impl("sampling", stvit::sampling);
  m.impl("sampling_backward", stvit::sampling_backward);
  m.impl("sampling_backward_full", stvit::sampling_backward_full);
  m.impl("upsampling", stvit::upsampling);
  m.impl("upsampling_backward", stvit::upsampling_backward);
  m.impl("upsampling_backward_full", stvit::upsampling_backward_full);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", stvit::build_info);
  m.def("plan", stvit::plan_of);
}
