// A register of floats, and what the kernels of this folder do with it. effcompile/ops/native.py puts this text before each source.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

// Dot products of pairs of bfloat16.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define EFF_DOT_BF16 1
#else
#define EFF_DOT_BF16 0
#endif

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int W = Vec::size();
constexpr float NEG = -std::numeric_limits<float>::infinity();

// A register of W floats. Arrays of at::vec's own class do not stay in registers in nested loops (GCC 12), those of the bare type do.
#if defined(CPU_CAPABILITY_AVX512)
using Reg = __m512;
inline Reg load(const float* p) { return _mm512_loadu_ps(p); }
inline Reg every(float x) { return _mm512_set1_ps(x); }
inline Reg add(Reg x, Reg y) { return _mm512_add_ps(x, y); }
inline Reg times(Reg x, Reg y) { return _mm512_mul_ps(x, y); }
inline Reg plus_product(Reg sum, Reg x, Reg y) { return _mm512_fmadd_ps(x, y, sum); }
inline void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
#elif defined(CPU_CAPABILITY_AVX2)
using Reg = __m256;
inline Reg load(const float* p) { return _mm256_loadu_ps(p); }
inline Reg every(float x) { return _mm256_set1_ps(x); }
inline Reg add(Reg x, Reg y) { return _mm256_add_ps(x, y); }
inline Reg times(Reg x, Reg y) { return _mm256_mul_ps(x, y); }
inline Reg plus_product(Reg sum, Reg x, Reg y) { return _mm256_fmadd_ps(x, y, sum); }
inline void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
#else
using Reg = Vec;
inline Reg load(const float* p) { return Vec::loadu(p); }
inline Reg every(float x) { return Vec(x); }
inline Reg add(Reg x, Reg y) { return x + y; }
inline Reg times(Reg x, Reg y) { return x * y; }
inline Reg plus_product(Reg sum, Reg x, Reg y) { return at::vec::fmadd(x, y, sum); }
inline void store(float* p, Reg x) { x.store(p); }
#endif

inline float total(Reg x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float held[W], sum = 0.f;
  store(held, x);
  for (float value : held) sum += value;
  return sum;
#endif
}

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace
