// What the kernels offer: plain C++, neither torch nor CUDA. Strides are in elements; a stream is a cudaStream_t of the
// current device. B, C, H, W: images, channels, rows, columns of pixels; a tile is h x w pixels, the grid gh x gw tiles.
// Weights lie as (B, H, W, 9), masses and offsets as (B, gh, gw), pooled super tokens as (B, gh, gw, C).
#pragma once

#include <cstdint>

#include "plan.h"

namespace stvit {

constexpr double MASS_EPSILON = 1e-12;  // added to the mass of a super token before it divides

// A (B, C, rows, columns) tensor: pixels, or super tokens.
struct View {
  void* data = nullptr;
  int64_t image = 0, channel = 0, row = 0, column = 0;

  // Whether a pixel's channels, of `size` bytes each, can be moved 16 bytes at a time: they are contiguous and every
  // pixel begins on 16 bytes.
  bool vectors(int size) const {
    const bool aligned = (image * size | row * size | column * size | reinterpret_cast<intptr_t>(data)) % 16 == 0;
    return channel == 1 && aligned;
  }
};

// pooled = mean over each tile of the zero-padded pixels.
struct Pooling {
  Type type;
  Shape shape;
  View pixels;
  void* pooled;
};
void pooling(const Pooling&, void* stream);

// Products of pixels with their 9 neighbouring super tokens, the map on them, and sums over pixels (plan.h, Map).
struct PixelsToTokens {
  Type type;
  Shape shape;
  Map map;
  double scale = 1;
  View pixels;
  View tokens;                    // not for weighted; associate: without data where the kernel pools them itself
  const void* weights = nullptr;  // not for associate
  const void* grad = nullptr;     // differentiate: gradient of the weights, may be left out
  const void* offset = nullptr;   // differentiate: <dS, S> / mass, in the accumulator's type
  void* mass = nullptr;           // written by associate, read by differentiate; in the accumulator's type
  void* pooled = nullptr;         // written by associate without tokens
  void* padding = nullptr;        // associate, where there is padding: scratch (B, gh, gw), a padded pixel's weights
  void* out = nullptr;            // weights (associate), products, or dlogit (differentiate)
  View stokens;                   // the sums: over the mass (associate), times scale (the others)
};
void pixels_to_tokens(const PixelsToTokens&, void* stream);

// pixels = sum over the 9 neighbours of weight * super token, and what is added to it.
struct TokensToPixels {
  Type type;
  Shape shape;
  View tokens;
  const void* weights;
  const void* mass = nullptr;  // divides the super tokens, in the accumulator's type
  View tokens2;                // with weights2: a second sum, times scale2
  const void* weights2 = nullptr;
  double scale2 = 0;
  const void* means = nullptr;  // (B, gh, gw, C): adds means / (h w) of the pixel's tile, the backward of pooling
  View residual;                // added where it has data; of residual_type
  Type residual_type = Type::half;
  View pixels;  // written; of pixels_type
  Type pixels_type = Type::half;
};
void tokens_to_pixels(const TokensToPixels&, void* stream);

}  // namespace stvit
