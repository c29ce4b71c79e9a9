// The 16-bit formats: conversions to float are exact, from float rounded to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace stvit::gpu {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

}  // namespace stvit::gpu

namespace stvit::emulation {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(gpu::bfloat16 x) { return of_bits(uint32_t(x.bits) << 16); }

inline gpu::bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};  // rounding could make NaN infinite
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(gpu::half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) return of_bits(sign | 0x7f800000 | magnitude);
  return of_bits(sign |
                 bits_of(of_bits(magnitude) * 0x1p112f));  // exponents of half count from -15, of float from -127
}

inline gpu::half to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
  if (x != x) return {uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x1ff))};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000)  // below 2^-14 steps are 2^-24, as those of float are from 0.5 on
    return {uint16_t(sign | (bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13)};
}

}  // namespace stvit::emulation
