// Products of rows of weights with panels of tokens in bfloat16, on dot products of pairs and on AMX. It comes after moe_tiles.h.
//
// A panel of pairs is [depth / 2][PANEL] numbers of 32 bits, two neighbors of one token in each. Weights are read as the model has
// them: 16 rows at even distances are one tile of AMX, where depths are multiples of 32. Others are even. Sums are in float32.

namespace {

// Whether products of T run on panels of pairs.
template <typename T>
constexpr bool PAIRS = EFF_DOT_BF16 && std::is_same_v<T, at::BFloat16>;

// Rows of weights that are made ready at a time.
template <typename P>
constexpr int64_t AT_ONCE = PAIRS<P> ? 64 : BLOCK;

#if EFF_DOT_BF16

// rows [count][depth] -> panel of pairs; tokens beyond count are 0.
inline void turn(const at::BFloat16* rows, int64_t stride, int64_t count, int64_t depth, at::BFloat16* panel) {
  // Two numbers move together, whatever their bits mean.
  turn(reinterpret_cast<const float*>(rows), stride / 2, count, depth / 2, reinterpret_cast<float*>(panel));
}

// The first W columns of rows of weights, turned: to[j * depth + k] = from[k * stride + j]. Returns the k from which on the rest is left.
inline int64_t turn_columns(const at::BFloat16* from, int64_t stride, int64_t depth, at::BFloat16* to) {
  float held[W * W];
  const auto wide = [&](int64_t k) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k * stride))); };
  int64_t k = 0;
  for (; k + 2 * W <= depth; k += 2 * W) {
    for (int64_t q = 0; q < W; ++q) {
      const __m512i pairs = _mm512_or_si512(wide(k + 2 * q), _mm512_slli_epi32(wide(k + 2 * q + 1), 16));
      _mm512_storeu_si512(held + q * W, pairs);
    }
    turn_block(held, W, reinterpret_cast<float*>(to + k), depth / 2);
  }
  return k;
}

// Numbers i and i + 1 of W tokens next to each other, rounded.
inline void store_pair(const Vec& even, const Vec& odd, at::BFloat16* to) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

template <int R, int N>
void tile(const at::BFloat16* const* rows, int64_t depth, const at::BFloat16* panel, float* c) {
  Reg sum[R][N];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) sum[i][n] = every(0.f);
  const at::BFloat16* row[R];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) row[i] = rows[i];
  for (int64_t k = 0; k < depth; k += 2, panel += 2 * PANEL) {
    __m512bh x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = (__m512bh)_mm512_loadu_si512(panel + 2 * n * W);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      int32_t pair;
      std::memcpy(&pair, row[i] + k, sizeof pair);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = _mm512_dpbf16_ps(sum[i][n], w, x[n]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) store(c + i * PANEL + n * W, sum[i][n]);
}

#endif
#if EFF_AMX

// c[16 * R][16 * N] of rows at one distance: registers 0 to 3 hold sums, 4 and 5 rows of weights, 6 and 7 tokens.
template <int R, int N>
inline void matrix_tile(const at::BFloat16* rows, int64_t stride, int64_t depth, const at::BFloat16* panel, float* c) {
  _tile_zero(0);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && N == 2) _tile_zero(3);
  for (int64_t k = 0; k < depth; k += STEP<at::BFloat16>) {
    _tile_loadd(4, rows + k, stride * 2);
    _tile_loadd(6, panel + k * PANEL, PANEL * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, panel + k * PANEL + 2 * W, PANEL * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, rows + 16 * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, PANEL * 4);
  if constexpr (N == 2) _tile_stored(1, c + W, PANEL * 4);
  if constexpr (R == 2) _tile_stored(2, c + 16 * PANEL, PANEL * 4);
  if constexpr (R == 2 && N == 2) _tile_stored(3, c + 16 * PANEL + W, PANEL * 4);
}

// How many of the rows, up to `most`, follow each other at one distance, in whole sixteens.
inline int64_t even_rows(const at::BFloat16* const* rows, int64_t count, int64_t most) {
  int64_t n = 1;
  while (n < std::min(count, most) && rows[n] - rows[n - 1] == rows[1] - rows[0]) ++n;
  return n / 16 * 16;
}

#endif

// c[count][PANEL] of a panel that holds `tokens` tokens.
inline void multiply(const TileRegisters&, int64_t tokens, int64_t count, const float* const* rows, int64_t depth, const float* panel,
                     float* c) {
  multiply(tokens, count, rows, depth, panel, c);
}

#if EFF_DOT_BF16
inline void multiply(const TileRegisters& registers, int64_t tokens, int64_t count, const at::BFloat16* const* rows, int64_t depth,
                     const at::BFloat16* panel, float* c) {
  int64_t i = 0;
#if EFF_AMX
  while (registers.on() && depth % STEP<at::BFloat16> == 0 && i + 16 <= count) {
    const int64_t many = even_rows(rows + i, count - i, 32);
    if (!many) break;
    const int64_t stride = rows[i + 1] - rows[i];
    for (int64_t n = 0; n < tokens; n += 32) {
      const at::BFloat16* x = panel + 2 * n;
      float* to = c + i * PANEL + n;
      if (tokens - n > 16) {
        many == 32 ? matrix_tile<2, 2>(rows[i], stride, depth, x, to) : matrix_tile<1, 2>(rows[i], stride, depth, x, to);
      } else {
        many == 32 ? matrix_tile<2, 1>(rows[i], stride, depth, x, to) : matrix_tile<1, 1>(rows[i], stride, depth, x, to);
      }
    }
    i += many;
  }
#endif
  if (i < count) multiply(tokens, count - i, rows + i, depth, panel, c + i * PANEL);
}
#endif

}  // namespace
