#include "walk.cuh"

namespace stvit {

template void run_walk<Map::products>(const PixelsToTokens&, const Walk&, void*);

}  // namespace stvit
