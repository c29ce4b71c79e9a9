#include "walk.cuh"

namespace stvit {

template void run_walk<Map::weighted>(const PixelsToTokens&, const Walk&, void*);

}  // namespace stvit
