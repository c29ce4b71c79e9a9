#include "walk.cuh"

namespace stvit {

template void run_walk<Map::differentiate>(const PixelsToTokens&, const Walk&, void*);

}  // namespace stvit
