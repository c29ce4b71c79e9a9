#include "walk.cuh"

namespace stvit {

template void run_walk<Map::associate, false>(const PixelsToTokens&, const Walk&, void*);
template void run_walk<Map::associate, true>(const PixelsToTokens&, const Walk&, void*);

}  // namespace stvit
