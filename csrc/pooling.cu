// Initial super tokens: the mean over each tile of the zero-padded pixels. Reads X once, writes X / (h w).
//
// A thread takes one channel of one tile. Rows are summed by themselves first, which keeps the rounding of long sums low.
#include <gpu.cuh>

#include "dispatch.h"
#include "launch.h"

namespace stvit {
namespace {

constexpr int THREADS = 128;

template <typename T>
__global__ void pooling_kernel(const Pooling call) {
  using Sum = typename gpu::Accumulator<T>::type;
  const Shape& shape = call.shape;
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= shape.batch * shape.gh * shape.gw * shape.channels) return;
  const int64_t channel = i % shape.channels, tile = i / shape.channels;
  const int64_t column = tile % shape.gw, row = tile / shape.gw % shape.gh, image = tile / shape.gw / shape.gh;
  const View& view = call.pixels;
  const T* from = static_cast<const T*>(view.data) + image * view.image + channel * view.channel;
  Sum sum = 0;
  for (int64_t y = row * shape.h; y < (row + 1) * shape.h && y < shape.height; ++y) {
    Sum line = 0;
    for (int64_t x = column * shape.w; x < (column + 1) * shape.w && x < shape.width; ++x)
      line += gpu::widen(gpu::load(from + y * view.row + x * view.column));
    sum += line;
  }
  gpu::store(static_cast<T*>(call.pooled) + i, gpu::narrow<T>(sum / Sum(shape.h * shape.w)));
}

}  // namespace

void pooling(const Pooling& call, void* stream) {
  const int64_t threads = call.shape.batch * call.shape.gh * call.shape.gw * call.shape.channels;
  with_type(call.type, [&](auto is) {
    using T = typename decltype(is)::type;
    gpu::launch(pooling_kernel<T>, (threads + THREADS - 1) / THREADS, THREADS, 0, stream, call);
  });
}

}  // namespace stvit
