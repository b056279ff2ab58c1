// The codes of a KV cache as floats in registers, and what reading and writing them share.

#include <c10/util/Float8_e4m3fn.h>

namespace {

constexpr int PANEL8 = 64;   // tokens side by side in a panel of 8-bit keys
constexpr int PANEL = 32;    // tokens in a panel of 4- and 2-bit keys; a group of tokens is whole panels
constexpr int CHANNELS = 32; // channels of a value that share a run of 16 bytes
// Where a number of bits is asked for: 8, as floats; the upper 8 of 12 bits, or all; 8 or 4 with scales that no token changes.
constexpr int FLOATS = 9, HIGH = 10, PLANES = 12, ROWS8 = 16, ROWS4 = 17;
constexpr int ROWS = W == 16 ? 6 : 3, TWICE = W == 16 ? 2 : 1;
constexpr int RUNS = 16 / W;  // registers that hold 16 codes

float wide(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
bool finite(float x) { return std::fabs(x) <= std::numeric_limits<float>::max(); }

#if defined(CPU_CAPABILITY_AVX512)
using Ints = __m512i;
inline Reg signed_codes(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// An 8-bit float with 4 bits of exponent is the upper part of a half, but for a factor of 256 that the scale takes.
inline Reg small_floats(const int8_t* p) {
  const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
}
inline Ints bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <int SHIFT, int MASK>
inline Reg field(Ints x) {
  const Ints moved = SHIFT ? _mm512_srli_epi32(x, SHIFT) : x;
  // Above the uppermost field of a byte there is nothing to mask.
  return _mm512_cvtepi32_ps((MASK << SHIFT) >= 128 ? moved : _mm512_and_si512(moved, _mm512_set1_epi32(MASK)));
}
inline Reg halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
#elif defined(CPU_CAPABILITY_AVX2)
using Ints = __m256i;
inline Reg signed_codes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Reg small_floats(const int8_t* p) {
  const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
}
inline Ints bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
template <int SHIFT, int MASK>
inline Reg field(Ints x) {
  const Ints moved = SHIFT ? _mm256_srli_epi32(x, SHIFT) : x;
  return _mm256_cvtepi32_ps((MASK << SHIFT) >= 128 ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(MASK)));
}
inline Reg halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
struct Ints {
  uint32_t x[W];
};
template <typename F>
inline Reg gathered(F f) {
  float x[W];
  for (int i = 0; i < W; ++i) x[i] = f(i);
  return load(x);
}
inline Reg signed_codes(const int8_t* p) {
  return gathered([&](int i) { return static_cast<float>(p[i]); });
}
inline Reg small_floats(const int8_t* p) {
  return gathered([&](int i) { return wide(static_cast<uint16_t>((p[i] * 128) & 0xbf80)); });
}
inline Ints bytes(const uint8_t* p) {
  Ints r;
  for (int i = 0; i < W; ++i) r.x[i] = p[i];
  return r;
}
template <int SHIFT, int MASK>
inline Reg field(Ints x) {
  return gathered([&](int i) { return static_cast<float>((x.x[i] >> SHIFT) & MASK); });
}
inline Reg halves(const uint16_t* p) {
  return gathered([&](int i) { return wide(p[i]); });
}
#endif

template <int BITS>
inline Reg codes8(const int8_t* p) {
  return BITS == FLOATS ? small_floats(p) : signed_codes(p);
}

// The codes of two channels (of keys) or two tokens (of values): 16 low and 16 high places of each, from bytes that lie together.
template <int BITS>
inline void unpack(const uint8_t* p, int64_t step, int run, Reg (&low)[2], Reg (&high)[2]) {
  if constexpr (BITS == 4) {
    const Ints a = bytes(p + run * W), b = bytes(p + step + run * W);
    low[0] = field<0, 15>(a), high[0] = field<4, 15>(a), low[1] = field<0, 15>(b), high[1] = field<4, 15>(b);
  } else {
    const Ints a = bytes(p + run * W);
    low[0] = field<0, 3>(a), high[0] = field<2, 3>(a), low[1] = field<4, 3>(a), high[1] = field<6, 3>(a);
  }
}

// Call f(integral_constant<rows>, first row) for tiles of at most ROWS rows.
template <typename F>
inline void by_rows(int64_t rows, F f) {
  for (int64_t i = 0; i < rows;) {
    switch (std::min<int64_t>(rows - i, ROWS)) {
      case 1: f(std::integral_constant<int, 1>{}, i); i += 1; break;
      case 2: f(std::integral_constant<int, 2>{}, i); i += 2; break;
      case 3: f(std::integral_constant<int, 3>{}, i); i += 3; break;
#if defined(CPU_CAPABILITY_AVX512)
      case 4: f(std::integral_constant<int, 4>{}, i); i += 4; break;
      case 5: f(std::integral_constant<int, 5>{}, i); i += 5; break;
      default: f(std::integral_constant<int, 6>{}, i); i += 6; break;
#endif
    }
  }
}

template <typename F>
void by_type(int64_t dtype, F f) {
  if (dtype == 0) {
    f(float{});
  } else if (dtype == 1) {
    f(c10::BFloat16{});
  } else {
    f(c10::Half{});
  }
}

}  // namespace
