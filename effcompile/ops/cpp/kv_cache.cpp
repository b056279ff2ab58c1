// Attention over a quantized KV cache on CPU, and the quantization of new tokens. effcompile/ops/kv/native.py compiles this once.
//
// Codes become floats in registers, inside the two products of attention: no dequantized key or value is ever stored. All query
// heads of a key head are taken together, so that a code is converted once for them. Keys lie in panels of tokens, so that scores
// of neighboring tokens fill a register; values lie in rows. The keys are split into parts of fixed length, which threads take in
// turn and whose results are merged by their maxima and sums: no result depends on the number of threads.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr float NEG = -std::numeric_limits<float>::infinity();
constexpr int CHUNK = 256;   // keys whose scores exist at a time
constexpr int SPLIT = 512;   // keys of one part
constexpr int PANEL8 = 64;   // tokens side by side in a panel of 8-bit keys
constexpr int PANEL = 32;    // tokens in a panel of 4- and 2-bit keys; a group of tokens is whole panels
constexpr int CHANNELS = 32; // channels of a value that share a run of 16 bytes

// --- registers -------------------------------------------------------------------------------------------------------------

#if defined(CPU_CAPABILITY_AVX512)
using Reg = __m512;
using Ints = __m512i;
constexpr int W = 16, ROWS = 6, TWICE = 2;
inline Reg load(const float* p) { return _mm512_loadu_ps(p); }
inline Reg every(float x) { return _mm512_set1_ps(x); }
inline Reg add(Reg x, Reg y) { return _mm512_add_ps(x, y); }
inline Reg times(Reg x, Reg y) { return _mm512_mul_ps(x, y); }
inline Reg plus_product(Reg sum, Reg x, Reg y) { return _mm512_fmadd_ps(x, y, sum); }
inline void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
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
inline float total(Reg x) { return _mm512_reduce_add_ps(x); }
#elif defined(CPU_CAPABILITY_AVX2)
using Reg = __m256;
using Ints = __m256i;
constexpr int W = 8, ROWS = 3, TWICE = 1;
inline Reg load(const float* p) { return _mm256_loadu_ps(p); }
inline Reg every(float x) { return _mm256_set1_ps(x); }
inline Reg add(Reg x, Reg y) { return _mm256_add_ps(x, y); }
inline Reg times(Reg x, Reg y) { return _mm256_mul_ps(x, y); }
inline Reg plus_product(Reg sum, Reg x, Reg y) { return _mm256_fmadd_ps(x, y, sum); }
inline void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
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
inline float total(Reg x) {
  float held[W], sum = 0.f;
  store(held, x);
  for (float value : held) sum += value;
  return sum;
}
#else
constexpr int W = 8, ROWS = 3, TWICE = 1;
struct Reg {
  float x[W];
};
struct Ints {
  uint32_t x[W];
};
#define EFF_EACH(R, value)                 \
  R r;                                     \
  for (int i = 0; i < W; ++i) r.x[i] = value; \
  return r;
inline Reg load(const float* p) { EFF_EACH(Reg, p[i]) }
inline Reg every(float x) { EFF_EACH(Reg, x) }
inline Reg add(Reg x, Reg y) { EFF_EACH(Reg, x.x[i] + y.x[i]) }
inline Reg times(Reg x, Reg y) { EFF_EACH(Reg, x.x[i] * y.x[i]) }
inline Reg plus_product(Reg sum, Reg x, Reg y) { EFF_EACH(Reg, sum.x[i] + x.x[i] * y.x[i]) }
inline void store(float* p, Reg x) {
  for (int i = 0; i < W; ++i) p[i] = x.x[i];
}
inline Reg signed_codes(const int8_t* p) { EFF_EACH(Reg, static_cast<float>(p[i])) }
inline Reg small_floats(const int8_t* p) {
  EFF_EACH(Reg, static_cast<float>(c10::Half(static_cast<uint16_t>((p[i] * 128) & 0xbf80), c10::Half::from_bits())))
}
inline Ints bytes(const uint8_t* p) { EFF_EACH(Ints, p[i]) }
template <int SHIFT, int MASK>
inline Reg field(Ints x) {
  EFF_EACH(Reg, static_cast<float>((x.x[i] >> SHIFT) & MASK))
}
inline Reg halves(const uint16_t* p) { EFF_EACH(Reg, static_cast<float>(c10::Half(p[i], c10::Half::from_bits()))) }
inline float total(Reg x) {
  float sum = 0.f;
  for (float value : x.x) sum += value;
  return sum;
}
#undef EFF_EACH
#endif

constexpr int FLOATS = 9;  // where a number of bits is asked for: 8, as floats
template <int BITS>
inline Reg codes8(const int8_t* p) {
  return BITS == FLOATS ? small_floats(p) : signed_codes(p);
}

constexpr int RUNS = 16 / W;  // registers that hold 16 codes

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
float wide(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
bool finite(float x) { return std::fabs(x) <= std::numeric_limits<float>::max(); }

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

// --- products with codes -----------------------------------------------------------------------------------------------------

// s[row, token] = sum over channels of q[row, channel] * code, for `panels` panels of PANEL8 tokens: k[panel][channel][PANEL8].
template <int R, int BITS>
void scores8(const int8_t* k, int64_t depth, int64_t panels, const float* q, float* s, int64_t lds) {
  constexpr int N = 4;
  for (int64_t at = 0; at < panels * PANEL8; at += N * W) {
    const int8_t* from = k + (at / PANEL8) * depth * PANEL8 + at % PANEL8;
    Reg sum[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      for (int n = 0; n < N; ++n) sum[i][n] = every(0.f);
    for (int64_t d = 0; d < depth; ++d, from += PANEL8) {
      Reg code[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) code[n] = codes8<BITS>(from + n * W);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Reg x = every(q[i * depth + d]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[i][n] = plus_product(sum[i][n], x, code[n]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      for (int n = 0; n < N; ++n) store(s + i * lds + at + n * W, sum[i][n]);
  }
}

// sums[row, channel] += sum over tokens of w[row, token] * code; rows of values are `width` codes, a multiple of 16.
template <int R, int N, int BITS>
void values8(const int8_t* v, int64_t width, int64_t count, const float* w, int64_t ldw, float* sums) {
  Reg sum[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) sum[i][n] = load(sums + i * width + n * W);
  for (int64_t j = 0; j < count; ++j, v += width) {
    Reg code[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) code[n] = codes8<BITS>(v + n * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Reg x = every(w[i * ldw + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = plus_product(sum[i][n], x, code[n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) store(sums + i * width + n * W, sum[i][n]);
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

// s[row, token] = bias[row] + sum over channels of q[row, channel] * code, for one panel: k[channel * BITS / 4][16].
template <int R, int BITS>
void scores_panel(const uint8_t* k, int64_t depth, const float* q, const float* bias, float* s, int64_t lds) {
  Reg sum[TWICE][R][2 * RUNS];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < 2 * RUNS; ++n) {
      sum[0][i][n] = every(bias[i]);
      if (TWICE == 2) sum[TWICE - 1][i][n] = every(0.f);
    }
  constexpr int64_t PAIR = 16 * BITS / 2;  // bytes of two channels
  for (int64_t d = 0; d < depth; d += 2, k += PAIR) {
#pragma GCC unroll 2
    for (int run = 0; run < RUNS; ++run) {
      Reg low[2], high[2];
      unpack<BITS>(k, 16, run, low, high);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Reg x = every(q[i * depth + d]), y = every(q[i * depth + d + 1]);
        sum[0][i][run] = plus_product(sum[0][i][run], x, low[0]);
        sum[0][i][RUNS + run] = plus_product(sum[0][i][RUNS + run], x, high[0]);
        sum[TWICE - 1][i][run] = plus_product(sum[TWICE - 1][i][run], y, low[1]);
        sum[TWICE - 1][i][RUNS + run] = plus_product(sum[TWICE - 1][i][RUNS + run], y, high[1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < 2 * RUNS; ++n)
      store(s + i * lds + n * W, TWICE == 2 ? add(sum[0][i][n], sum[TWICE - 1][i][n]) : sum[0][i][n]);
}

// sums[row, 32 channels] += sum over tokens of w[row, token] * code; two tokens lie `pair` bytes after the two before them.
template <int R, int BITS>
void values_run(const uint8_t* v, int64_t row, int64_t count, const float* w, int64_t ldw, float* sums, int64_t lds) {
  Reg sum[TWICE][R][2 * RUNS];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < 2 * RUNS; ++n) {
      sum[0][i][n] = load(sums + i * lds + n * W);
      if (TWICE == 2) sum[TWICE - 1][i][n] = every(0.f);
    }
  const int64_t pair = BITS == 4 ? 2 * row : row;
  for (int64_t j = 0; j < count; j += 2, v += pair) {
#pragma GCC unroll 2
    for (int run = 0; run < RUNS; ++run) {
      Reg low[2], high[2];
      unpack<BITS>(v, row, run, low, high);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Reg x = every(w[i * ldw + j]), y = every(w[i * ldw + j + 1]);
        sum[0][i][run] = plus_product(sum[0][i][run], x, low[0]);
        sum[0][i][RUNS + run] = plus_product(sum[0][i][RUNS + run], x, high[0]);
        sum[TWICE - 1][i][run] = plus_product(sum[TWICE - 1][i][run], y, low[1]);
        sum[TWICE - 1][i][RUNS + run] = plus_product(sum[TWICE - 1][i][RUNS + run], y, high[1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < 2 * RUNS; ++n)
      store(sums + i * lds + n * W, TWICE == 2 ? add(sum[0][i][n], sum[TWICE - 1][i][n]) : sum[0][i][n]);
}

// --- the problem -------------------------------------------------------------------------------------------------------------

struct Problem {
  int64_t batch, heads, kv_heads, rows, depth, width;  // rows: queries of one head
  int64_t length, fresh, packed, capacity;  // tokens in all, of this call, in packed form; tokens that the buffers hold
  int64_t group, residual;                  // of grouped formats; 0 for 8 bits
  int64_t mask_kind, causal, threads;       // mask_kind: 0 none, 1 bool, 2 float
  int64_t k_stride[3], v_stride[3], mask_stride[4];
  const void *q, *k, *v, *mask;
  const uint8_t *k_codes, *v_codes;
  const uint16_t *k_scales, *k_zeros, *v_scales, *v_zeros;
  const void *k_recent, *v_recent;
  void* out;
  float* lse;
  float scale, softcap;

  int64_t group_rows() const { return heads / kv_heads * rows; }
  int64_t old() const { return length - fresh; }
};

struct Scratch {
  std::vector<float> scores, weights, queries, bias, row, zeros;
};

struct Partial {  // of one part: maxima, sums of exponentials, weighted values [group_rows, padded width]
  float *top, *sum, *values;
};

// Whether any row may see a key of [begin, begin + count).
bool any_visible(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t count) {
  if (p.mask_kind != 1) return true;
  const int64_t shared = p.mask_stride[1] == 0 ? 1 : p.heads / p.kv_heads;
  for (int64_t h = 0; h < shared; ++h)
    for (int64_t i = 0; i < p.rows; ++i) {
      const uint8_t* m = static_cast<const uint8_t*>(p.mask) + b * p.mask_stride[0] +
                         (g * (p.heads / p.kv_heads) + h) * p.mask_stride[1] + i * p.mask_stride[2] + begin * p.mask_stride[3];
      for (int64_t j = 0; j < count; ++j)
        if (m[j * p.mask_stride[3]]) return true;
    }
  return false;
}

// Cap and mask the scores of keys [begin, begin + count) of all rows; what lies between count and padded is no key.
void restrict_scores(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t count, int64_t padded, float* s, int64_t lds) {
  const int64_t group = p.heads / p.kv_heads, rows = p.group_rows();
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s + i * lds;
    if (p.softcap > 0.f)
      for (int64_t j = 0; j < count; ++j) row[j] = std::tanh(row[j] / p.softcap) * p.softcap;
    const int64_t query = i % p.rows, head = g * group + i / p.rows;
    if (p.mask_kind) {
      const int64_t at = b * p.mask_stride[0] + head * p.mask_stride[1] + query * p.mask_stride[2] + begin * p.mask_stride[3];
      const int64_t step = p.mask_stride[3];
      if (p.mask_kind == 1) {
        const uint8_t* m = static_cast<const uint8_t*>(p.mask) + at;
        if (step == 1) {
          for (int64_t j = 0; j < count; ++j) row[j] = m[j] ? row[j] : NEG;
        } else {
          for (int64_t j = 0; j < count; ++j) row[j] = m[j * step] ? row[j] : NEG;
        }
      } else {
        const float* m = static_cast<const float*>(p.mask) + at;
        for (int64_t j = 0; j < count; ++j) row[j] += m[j * step];
      }
    }
    if (p.causal) {
      const int64_t last = p.old() + query - begin;  // the last key of the chunk that this query sees
      for (int64_t j = std::clamp<int64_t>(last + 1, 0, count); j < count; ++j) row[j] = NEG;
    }
    for (int64_t j = count; j < padded; ++j) row[j] = NEG;
  }
}

// Turn scores into exp(score - maximum) and rescale what was summed under another maximum.
void soften(const Problem& p, float* s, int64_t lds, int64_t padded, const Partial& to, int64_t values) {
  for (int64_t i = 0; i < p.group_rows(); ++i) {
    float* row = s + i * lds;
    Vec most(NEG);
    for (int64_t j = 0; j < padded; j += Vec::size()) most = at::vec::maximum(most, Vec::loadu(row + j));
    float top = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most);
    if (top <= to.top[i]) top = to.top[i];  // NaN stays, and so does the row
    const float shift = top == NEG ? 0.f : top;
    const Vec by(-shift);
    Vec sum(0.f);
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec e = (Vec::loadu(row + j) + by).exp_u20();
      e.store(row + j);
      sum = sum + e;
    }
    const float alpha = std::exp(to.top[i] - shift);
    float held[Vec::size()], added = 0.f;
    sum.store(held);
    for (float value : held) added += value;
    to.sum[i] = to.sum[i] * alpha + added;
    to.top[i] = top;
    if (alpha != 1.f)
      for (int64_t d = 0; d < values; ++d) to.values[i * values + d] *= alpha;
  }
}

// --- a part of the packed tokens -----------------------------------------------------------------------------------------------

template <int BITS>
void attend_packed(const Problem& p, const float* q, int64_t b, int64_t g, int64_t begin, int64_t end, Scratch& own,
                   const Partial& to) {
  const int64_t rows = p.group_rows(), lds = CHUNK, bg = b * p.kv_heads + g;
  const int64_t values = BITS >= 8 ? up(p.width, 16) : p.width, runs = p.width / CHANNELS;
  own.scores.resize(rows * lds);
  float* s = own.scores.data();
  for (int64_t at = begin; at < end; at += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, end - at);
    if (!any_visible(p, b, g, at, count)) continue;
    if constexpr (BITS >= 8) {
      const Reg unit = every(BITS == FLOATS ? 256.f : 1.f);
      const int64_t padded = up(count, PANEL8);
      own.weights.resize(rows * lds);
      const int8_t* k = reinterpret_cast<const int8_t*>(p.k_codes) + (bg * p.capacity + at) * p.depth;
      by_rows(rows, [&](auto n, int64_t i) {
        scores8<n.value, BITS>(k, p.depth, padded / PANEL8, q + i * p.depth, s + i * lds, lds);
      });
      const uint16_t *ks = p.k_scales + bg * p.capacity + at, *vs = p.v_scales + bg * p.capacity + at;
      for (int64_t j = 0; j < padded; j += W) {
        const Reg scale = times(halves(ks + j), unit);
        for (int64_t i = 0; i < rows; ++i) store(s + i * lds + j, times(load(s + i * lds + j), scale));
      }
      restrict_scores(p, b, g, at, count, padded, s, lds);
      soften(p, s, lds, padded, to, values);
      float* w = own.weights.data();
      for (int64_t j = 0; j < padded; j += W) {
        const Reg scale = times(halves(vs + j), unit);
        for (int64_t i = 0; i < rows; ++i) store(w + i * lds + j, times(load(s + i * lds + j), scale));
      }
      const int8_t* v = reinterpret_cast<const int8_t*>(p.v_codes) + (bg * p.capacity + at) * values;
      by_rows(rows, [&](auto n, int64_t i) {
        int64_t d = 0;
        for (; d + 4 * W <= values; d += 4 * W)
          values8<n.value, 4, BITS>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
        for (; d < values; d += W) values8<n.value, 1, BITS>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
      });
    } else {
      const int64_t padded = up(count, PANEL), groups = p.capacity / p.group, spans = p.width / p.group;
      own.queries.resize(rows * p.depth);
      own.bias.resize(rows);
      own.zeros.resize(2 * std::max(p.depth, p.width));
      float *scaled = own.queries.data(), *bias = own.bias.data();
      const uint8_t* k = p.k_codes + (bg * p.capacity + at) * p.depth * BITS / 8;
      for (int64_t j = 0; j < padded; j += PANEL) {
        if (j == 0 || (at + j) % p.group == 0) {  // a group begins: its scales go into the queries
          const int64_t line = (bg * groups + (at + j) / p.group) * p.depth;
          for (int64_t i = 0; i < rows; ++i) {
            Reg sum = every(0.f);
            for (int64_t d = 0; d < p.depth; d += W) {
              const Reg x = load(q + i * p.depth + d);
              store(scaled + i * p.depth + d, times(x, halves(p.k_scales + line + d)));
              sum = plus_product(sum, x, halves(p.k_zeros + line + d));
            }
            bias[i] = total(sum);
          }
        }
        by_rows(rows, [&](auto n, int64_t i) {
          scores_panel<n.value, BITS>(k + j * p.depth * BITS / 8, p.depth, scaled + i * p.depth, bias + i, s + i * lds + j, lds);
        });
      }
      restrict_scores(p, b, g, at, count, padded, s, lds);
      soften(p, s, lds, padded, to, values);
      own.weights.resize(rows * lds);
      float* w = own.weights.data();
      const uint8_t* v = p.v_codes + (bg * p.capacity + at) * p.width * BITS / 8;
      for (int64_t span = 0; span < spans; ++span) {
        const int64_t line = (bg * spans + span) * p.capacity + at;
        for (int64_t i = 0; i < rows; ++i) {
          Reg sum = every(0.f);
          for (int64_t j = 0; j < padded; j += W) {
            const Reg prob = load(s + i * lds + j);
            store(w + i * lds + j, times(prob, halves(p.v_scales + line + j)));
            sum = plus_product(sum, prob, halves(p.v_zeros + line + j));
          }
          const Reg shift = every(total(sum));
          float* sums = to.values + i * values + span * p.group;
          for (int64_t d = 0; d < p.group; d += W) store(sums + d, add(load(sums + d), shift));
        }
        for (int64_t run = span * p.group / CHANNELS; run < (span + 1) * p.group / CHANNELS; ++run)
          by_rows(rows, [&](auto n, int64_t i) {
            values_run<n.value, BITS>(v + run * 16, runs * 16, padded, w + i * lds, lds, to.values + i * values + run * CHANNELS,
                                      values);
          });
      }
    }
  }
}

// --- the tokens that are not packed: the recent ones, and those of this call ----------------------------------------------------

inline void widen(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
template <typename T>
inline void widen(const T* from, float* to, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] = static_cast<float>(from[d]);
}

inline float dot(const float* x, const float* y, int64_t count) {
  Reg sum = every(0.f);
  int64_t d = 0;
  for (; d + W <= count; d += W) sum = plus_product(sum, load(x + d), load(y + d));
  float result = total(sum);
  for (; d < count; ++d) result += x[d] * y[d];
  return result;
}

template <typename T>
void attend_plain(const Problem& p, const float* q, int64_t b, int64_t g, int64_t begin, Scratch& own, const Partial& to) {
  const int64_t rows = p.group_rows(), lds = CHUNK, bg = b * p.kv_heads + g;
  const int64_t values = p.group ? p.width : up(p.width, 16);
  own.scores.resize(rows * lds);
  own.row.resize(std::max(p.depth, p.width));
  float *s = own.scores.data(), *row = own.row.data();
  const auto of = [&](int64_t j, bool key) {
    if (j >= p.old()) {
      const int64_t* stride = key ? p.k_stride : p.v_stride;
      return static_cast<const T*>(key ? p.k : p.v) + b * stride[0] + g * stride[1] + (j - p.old()) * stride[2];
    }
    const int64_t many = key ? p.depth : p.width;
    return static_cast<const T*>(key ? p.k_recent : p.v_recent) + (bg * p.residual + j % p.residual) * many;
  };
  for (int64_t at = begin; at < p.length; at += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, p.length - at), padded = up(count, 16);
    if (!any_visible(p, b, g, at, count)) continue;
    for (int64_t j = 0; j < count; ++j) {
      widen(of(at + j, true), row, p.depth);
      for (int64_t i = 0; i < rows; ++i) s[i * lds + j] = dot(q + i * p.depth, row, p.depth);
    }
    restrict_scores(p, b, g, at, count, padded, s, lds);
    soften(p, s, lds, padded, to, values);
    for (int64_t j = 0; j < count; ++j) {
      widen(of(at + j, false), row, p.width);
      for (int64_t i = 0; i < rows; ++i) {
        const float by = s[i * lds + j];
        float* sums = to.values + i * values;
        // A row that does not see the token may meet anything in it, NaN too.
        if (by != 0.f)
          for (int64_t d = 0; d < p.width; ++d) sums[d] += by * row[d];
      }
    }
  }
}

// --- all of it ---------------------------------------------------------------------------------------------------------------

template <typename T, int BITS>
void attend(const Problem& p) {
  const int64_t rows = p.group_rows(), values = p.group ? p.width : up(p.width, 16), pairs = p.batch * p.kv_heads;
  const int64_t packed = std::min(p.packed, p.old()), splits = (packed + SPLIT - 1) / SPLIT, parts = splits + 1;
  std::vector<float> queries(pairs * rows * p.depth), tops(pairs * parts * rows, NEG), sums(pairs * parts * rows, 0.f),
      weighted(pairs * parts * rows * values, 0.f);
  const T* q = static_cast<const T*>(p.q);
  for (size_t n = 0; n < queries.size(); ++n) queries[n] = static_cast<float>(q[n]) * p.scale;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch own;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < pairs * parts; ++n) {
      const int64_t bg = n / parts, b = bg / p.kv_heads, g = bg % p.kv_heads, part = n % parts;
      const Partial to{tops.data() + n * rows, sums.data() + n * rows, weighted.data() + n * rows * values};
      const float* mine = queries.data() + bg * rows * p.depth;
      if (part < splits) {
        attend_packed<BITS>(p, mine, b, g, part * SPLIT, std::min<int64_t>(packed, (part + 1) * SPLIT), own, to);
      } else {
        attend_plain<T>(p, mine, b, g, packed, own, to);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < pairs * rows; ++n) {
      const int64_t bg = n / rows, i = n % rows;
      float top = NEG, sum = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, tops[(bg * parts + part) * rows + i]);
      const float shift = top == NEG ? 0.f : top;
      own.row.assign(p.width, 0.f);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = (bg * parts + part) * rows + i;
        const float by = std::exp(tops[at] - shift);
        if (tops[at] == NEG) continue;  // nothing was visible in it
        sum += sums[at] * by;
        for (int64_t d = 0; d < p.width; ++d) own.row[d] += weighted[at * values + d] * by;
      }
      const float by = sum > 0.f ? 1.f / sum : sum == 0.f ? 0.f : sum;
      T* out = static_cast<T*>(p.out) + n * p.width;
      for (int64_t d = 0; d < p.width; ++d) out[d] = static_cast<T>(own.row[d] * by);
      p.lse[n] = sum > 0.f ? top + std::log(sum) : sum == 0.f ? NEG : sum;
    }
  }
}

// --- quantization --------------------------------------------------------------------------------------------------------------

uint16_t half_of(float x) { return c10::Half(x).x; }
uint16_t next_up(uint16_t bits) { return bits + 1; }  // of a number that is not negative
uint16_t next_down(uint16_t bits) { return (bits & 0x7fff) == 0 ? 0x8001 : bits & 0x8000 ? bits + 1 : bits - 1; }
constexpr uint16_t NAN16 = 0x7e00;

// Scale of one row of symmetric 8-bit codes: the half next to the quotient that leaves no code beyond what rounds to the largest.
template <typename T, int BITS>
uint16_t scale8(const T* x, int64_t count) {
  float most = 0.f;
  bool sound = true;
  for (int64_t d = 0; d < count; ++d) {
    const float value = std::fabs(static_cast<float>(x[d]));
    most = std::max(most, value);
    sound = sound && finite(value);
  }
  if (!sound) return NAN16;
  constexpr float largest = BITS == FLOATS ? 448.f : 127.f, beyond = BITS == FLOATS ? 456.f : 127.5f;
  uint16_t scale = half_of(most / largest);
  if (beyond * wide(scale) < most) scale = next_up(scale);
  return scale;
}

template <int BITS>
inline int8_t code8(float x, float scale) {
  if (!(scale > 0.f) || !finite(scale)) return 0;
  if (BITS == FLOATS) return static_cast<int8_t>(c10::Float8_e4m3fn(std::clamp(x / scale, -448.f, 448.f)).x);
  return static_cast<int8_t>(std::clamp(std::nearbyint(x / scale), -127.f, 127.f));
}

struct Append {
  int64_t batch, kv_heads, depth, width, count, length, packed, packed_after, capacity, group, residual, threads;
  int64_t k_stride[3], v_stride[3];
  const void *k, *v;
  uint8_t *k_codes, *v_codes;
  uint16_t *k_scales, *k_zeros, *v_scales, *v_zeros;
  void *k_recent, *v_recent;
};

template <typename T, int BITS>
void append8(const Append& a) {
  const int64_t width = up(a.width, 16);
#pragma omp parallel for collapse(2) schedule(static) num_threads(a.threads) if (a.count > 64)
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg) {
    for (int64_t t = 0; t < a.count; ++t) {
      const int64_t b = bg / a.kv_heads, g = bg % a.kv_heads, at = a.length + t, place = bg * a.capacity + at;
      const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + g * a.k_stride[1] + t * a.k_stride[2];
      const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + g * a.v_stride[1] + t * a.v_stride[2];
      a.k_scales[place] = scale8<T, BITS>(k, a.depth);
      a.v_scales[place] = scale8<T, BITS>(v, a.width);
      const float ks = wide(a.k_scales[place]), vs = wide(a.v_scales[place]);
      int8_t* panel = reinterpret_cast<int8_t*>(a.k_codes) + (bg * a.capacity + at / PANEL8 * PANEL8) * a.depth + at % PANEL8;
      for (int64_t d = 0; d < a.depth; ++d) panel[d * PANEL8] = code8<BITS>(static_cast<float>(k[d]), ks);
      int8_t* row = reinterpret_cast<int8_t*>(a.v_codes) + place * width;
      for (int64_t d = 0; d < a.width; ++d) row[d] = code8<BITS>(static_cast<float>(v[d]), vs);
    }
  }
}

// Scale and zero of a group: the zero is the largest half that is not above any value, the scale the least that reaches all.
struct Grid {
  uint16_t scale, zero;
};

inline Grid grid_of(float least, float most, bool sound, int levels) {
  if (!sound) return {NAN16, NAN16};
  uint16_t zero = half_of(least);
  if (wide(zero) > least) zero = next_down(zero);
  const float span = (most - wide(zero)) / static_cast<float>(levels);
  uint16_t scale = half_of(span);
  if (wide(scale) < span) scale = next_up(scale);
  return {scale, zero};
}

inline uint8_t code_of(float x, float scale, float zero, int levels) {
  if (!(scale > 0.f) || !finite(scale)) return 0;
  return static_cast<uint8_t>(std::clamp(std::nearbyint((x - zero) / scale), 0.f, static_cast<float>(levels)));
}

// Pack the group of tokens that begins at `first`: keys per channel, values per token and span of channels.
template <typename T, int BITS, typename Key, typename Value>
void pack_group(const Append& a, int64_t bg, int64_t first, Key key, Value value) {
  constexpr int levels = (1 << BITS) - 1;
  const int64_t group = a.group, spans = a.width / group, runs = a.width / CHANNELS;
  const int64_t line = (bg * (a.capacity / group) + first / group) * a.depth;
  std::vector<uint8_t> codes(group * std::max(a.depth, a.width));
  for (int64_t d = 0; d < a.depth; ++d) {
    float least = std::numeric_limits<float>::infinity(), most = -least;
    bool sound = true;
    for (int64_t t = 0; t < group; ++t) {
      const float x = static_cast<float>(key(first + t)[d]);
      least = std::min(least, x), most = std::max(most, x), sound = sound && finite(x);
    }
    const Grid grid = grid_of(least, most, sound, levels);
    a.k_scales[line + d] = grid.scale, a.k_zeros[line + d] = grid.zero;
    for (int64_t t = 0; t < group; ++t)
      codes[d * group + t] = code_of(static_cast<float>(key(first + t)[d]), wide(grid.scale), wide(grid.zero), levels);
  }
  uint8_t* k = a.k_codes + (bg * a.capacity + first) * a.depth * BITS / 8;
  for (int64_t panel = 0; panel < group; panel += PANEL, k += PANEL * a.depth * BITS / 8)
    for (int64_t d = 0; d < a.depth; d += 2)
      for (int64_t t = 0; t < 16; ++t) {
        const uint8_t *x = codes.data() + d * group + panel + t, *y = x + group;
        if constexpr (BITS == 4) {
          k[d * 16 + t] = x[0] | x[16] << 4;
          k[d * 16 + 16 + t] = y[0] | y[16] << 4;
        } else {
          k[d * 8 + t] = x[0] | x[16] << 2 | y[0] << 4 | y[16] << 6;
        }
      }
  for (int64_t t = 0; t < group; ++t) {
    const T* from = value(first + t);
    for (int64_t span = 0; span < spans; ++span) {
      float least = std::numeric_limits<float>::infinity(), most = -least;
      bool sound = true;
      for (int64_t d = span * group; d < (span + 1) * group; ++d) {
        const float x = static_cast<float>(from[d]);
        least = std::min(least, x), most = std::max(most, x), sound = sound && finite(x);
      }
      const Grid grid = grid_of(least, most, sound, levels);
      const int64_t at = (bg * spans + span) * a.capacity + first + t;
      a.v_scales[at] = grid.scale, a.v_zeros[at] = grid.zero;
      for (int64_t d = span * group; d < (span + 1) * group; ++d)
        codes[t * a.width + d] = code_of(static_cast<float>(from[d]), wide(grid.scale), wide(grid.zero), levels);
    }
  }
  uint8_t* v = a.v_codes + (bg * a.capacity + first) * a.width * BITS / 8;
  for (int64_t t = 0; t < group; t += 2)
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t d = 0; d < 16; ++d) {
        const uint8_t *x = codes.data() + t * a.width + run * CHANNELS + d, *y = x + a.width;
        if constexpr (BITS == 4) {
          v[(t * runs + run) * 16 + d] = x[0] | x[16] << 4;
          v[((t + 1) * runs + run) * 16 + d] = y[0] | y[16] << 4;
        } else {
          v[(t / 2 * runs + run) * 16 + d] = x[0] | x[16] << 2 | y[0] << 4 | y[16] << 6;
        }
      }
}

template <typename T, int BITS>
void append_grouped(const Append& a) {
  const int64_t groups = (a.packed_after - a.packed) / a.group;
  const auto row = [&](int64_t bg, int64_t j, bool key) {
    const int64_t many = key ? a.depth : a.width;
    if (j < a.length) return static_cast<const T*>(key ? a.k_recent : a.v_recent) + (bg * a.residual + j % a.residual) * many;
    const int64_t* stride = key ? a.k_stride : a.v_stride;
    return static_cast<const T*>(key ? a.k : a.v) + bg / a.kv_heads * stride[0] + bg % a.kv_heads * stride[1] +
           (j - a.length) * stride[2];
  };
#pragma omp parallel for collapse(2) schedule(static) num_threads(a.threads) if (groups * a.batch * a.kv_heads > 2)
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg)
    for (int64_t n = 0; n < groups; ++n)
      pack_group<T, BITS>(
          a, bg, a.packed + n * a.group, [&](int64_t j) { return row(bg, j, true); }, [&](int64_t j) { return row(bg, j, false); });
  // What stays is written last: a group may have been read from the places that it takes.
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg)
    for (int64_t j = std::max(a.length, a.packed_after); j < a.length + a.count; ++j) {
      std::memcpy(static_cast<T*>(a.k_recent) + (bg * a.residual + j % a.residual) * a.depth, row(bg, j, true), a.depth * sizeof(T));
      std::memcpy(static_cast<T*>(a.v_recent) + (bg * a.residual + j % a.residual) * a.width, row(bg, j, false), a.width * sizeof(T));
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

// dtype: 0 float, 1 bfloat16, 2 half, of q, k, v, the recent tokens and the result; bits 8, 4, 2 or FLOATS. Sizes and pointers in the order of use.
extern "C" void eff_kv_attention(int64_t dtype, int64_t bits, const int64_t* sizes, const void* const* at, float scale, float softcap) {
  Problem p{};
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.depth, &p.width, &p.length, &p.fresh, &p.packed, &p.capacity,
                         &p.group, &p.residual, &p.mask_kind, &p.causal, &p.threads})
    *field = *sizes++;
  for (int i = 0; i < 3; ++i) p.k_stride[i] = *sizes++;
  for (int i = 0; i < 3; ++i) p.v_stride[i] = *sizes++;
  for (int i = 0; i < 4; ++i) p.mask_stride[i] = *sizes++;
  p.q = at[0], p.k = at[1], p.v = at[2], p.mask = at[3];
  p.out = const_cast<void*>(at[4]), p.lse = static_cast<float*>(const_cast<void*>(at[5]));
  p.k_codes = static_cast<const uint8_t*>(at[6]), p.v_codes = static_cast<const uint8_t*>(at[7]);
  p.k_scales = static_cast<const uint16_t*>(at[8]), p.v_scales = static_cast<const uint16_t*>(at[9]);
  p.k_zeros = static_cast<const uint16_t*>(at[10]), p.v_zeros = static_cast<const uint16_t*>(at[11]);
  p.k_recent = at[12], p.v_recent = at[13];
  p.scale = scale, p.softcap = softcap;
  by_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (bits == 8) {
      attend<T, 8>(p);
    } else if (bits == FLOATS) {
      attend<T, FLOATS>(p);
    } else if (bits == 4) {
      attend<T, 4>(p);
    } else {
      attend<T, 2>(p);
    }
  });
}

extern "C" void eff_kv_append(int64_t dtype, int64_t bits, const int64_t* sizes, void* const* at) {
  Append a{};
  for (int64_t* field : {&a.batch, &a.kv_heads, &a.depth, &a.width, &a.count, &a.length, &a.packed, &a.packed_after, &a.capacity,
                         &a.group, &a.residual, &a.threads})
    *field = *sizes++;
  for (int i = 0; i < 3; ++i) a.k_stride[i] = *sizes++;
  for (int i = 0; i < 3; ++i) a.v_stride[i] = *sizes++;
  a.k = at[0], a.v = at[1];
  a.k_codes = static_cast<uint8_t*>(at[2]), a.v_codes = static_cast<uint8_t*>(at[3]);
  a.k_scales = static_cast<uint16_t*>(at[4]), a.v_scales = static_cast<uint16_t*>(at[5]);
  a.k_zeros = static_cast<uint16_t*>(at[6]), a.v_zeros = static_cast<uint16_t*>(at[7]);
  a.k_recent = at[8], a.v_recent = at[9];
  by_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (bits == 8) {
      append8<T, 8>(a);
    } else if (bits == FLOATS) {
      append8<T, FLOATS>(a);
    } else if (bits == 4) {
      append_grouped<T, 4>(a);
    } else {
      append_grouped<T, 2>(a);
    }
  });
}
