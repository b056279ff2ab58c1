// Products of rows of weights with panels of tokens, and what lies between them. It comes after registers.h and before moe_rows.h.
//
// A tile is R rows of weights times N registers of tokens. Weights are broadcast one by one from rows that are contiguous along the
// depth, so that they need no packing; tokens were packed once into panels [depth][PANEL].

namespace {

constexpr int VECTORS = W == 16 ? 4 : 2;           // registers of tokens in a panel
constexpr int64_t PANEL = VECTORS * W;             // tokens in a panel
constexpr int64_t CHUNK = 4;                       // panels that a task multiplies by one expert's weights
constexpr int64_t FEW = 8;                         // tokens of an expert up to which rows are multiplied one by one
constexpr int64_t BLOCK = 48;                      // rows of weights that are made ready at a time
constexpr int rows_of(int n) { return W == 16 ? (n == 4 ? 6 : n == 3 ? 8 : 12) : 6; }

struct Gate {
  int act, layout;  // silu gelu gelu_tanh relu relu2 identity; 0 none, 1 concat, 2 interleaved
  float alpha, beta, limit;
};

// The layout of one expert's weight: `outputs` rows of `depth` numbers, or `depth` rows of `outputs` where it is transposed.
struct Shape {
  int64_t whole, stride, depth, outputs;
  bool transposed;
};

template <typename T>
struct Weights {
  const T* data;
  const T* bias;
  Shape shape;
  const T* up = nullptr;  // the rows behind the gates, where those are a tensor of their own
};

struct Scratch {
  std::unique_ptr<float[]> held[4];
  int64_t size[4] = {0, 0, 0, 0};
  float* get(int n, int64_t count) {
    if (size[n] < count) {
      held[n].reset(new float[count + 2 * W]);
      size[n] = count;
    }
    return held[n].get();
  }
  float* rows(int64_t count) { return get(0, count); }
  float* weights(int64_t count) { return get(1, count); }
  float* tile(int64_t count) { return get(2, count); }
  float* gates(int64_t count) { return get(3, count); }
};

// --- numbers of any type as floats -----------------------------------------------------------------------------------------

inline Reg wide(const float* p) { return load(p); }
#if defined(CPU_CAPABILITY_AVX512)
inline Reg wide(const at::BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Reg wide(const at::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
#elif defined(CPU_CAPABILITY_AVX2)
inline Reg wide(const at::BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Reg wide(const at::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
template <typename T>
inline Reg wide(const T* p) {
  float held[W];
  for (int i = 0; i < W; ++i) held[i] = static_cast<float>(p[i]);
  return load(held);
}
#endif

template <typename T>
void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, wide(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename T>
void narrow(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

inline void scale(float* x, int64_t count, float by) {
  for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

inline void accumulate(float* y, const float* x, int64_t count, float by) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(y + i, plus_product(load(y + i), every(by), load(x + i)));
  for (; i < count; ++i) y[i] += by * x[i];
}

// --- transposes ------------------------------------------------------------------------------------------------------------

inline void turn_block(const float* from, int64_t stride, float* to, int64_t ld) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  at::vec::transpose_mxn<float, W, W>(from, stride, to, ld);
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) to[j * ld + i] = from[i * stride + j];
#endif
}

// rows [count][stride] -> panel [depth][PANEL]; tokens beyond count are 0.
inline void turn(const float* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
  if (count < PANEL) std::fill(panel, panel + depth * PANEL, 0.f);
  int64_t n = 0;
  for (; n + W <= count; n += W) {
    int64_t k = 0;
    for (; k + W <= depth; k += W) turn_block(rows + n * stride + k, stride, panel + k * PANEL + n, PANEL);
    for (; k < depth; ++k)
      for (int64_t i = n; i < n + W; ++i) panel[k * PANEL + i] = rows[i * stride + k];
  }
  for (; n < count; ++n)
    for (int64_t k = 0; k < depth; ++k) panel[k * PANEL + n] = rows[n * stride + k];
}

// --- activations -----------------------------------------------------------------------------------------------------------

inline Vec activated(const Gate& gate, Vec g) {
  const Vec one(1.f);
  switch (gate.act) {
    case 0:
      return g / (one + (Vec(-gate.alpha) * g).exp());
    case 1:
      return Vec(0.5f) * g * (one + (g * Vec(0.70710678118654752f)).erf());
    case 2:
      return Vec(0.5f) * g * (one + (Vec(0.79788456080286536f) * (g + Vec(0.044715f) * g * g * g)).tanh());
    case 3:
      return at::vec::maximum(g, Vec(0.f));
    case 4: {
      const Vec r = at::vec::maximum(g, Vec(0.f));
      return r * r;
    }
    default:
      return g;
  }
}

// act(min(g, limit)) * (clamp(u, -limit, limit) + beta), for W numbers; without a gate u is not read.
inline Vec combined(const Gate& gate, Vec g, Vec u) {
  if (gate.limit > 0.f) {
    g = at::vec::minimum(g, Vec(gate.limit));
    u = at::vec::maximum(at::vec::minimum(u, Vec(gate.limit)), Vec(-gate.limit));
  }
  const Vec a = activated(gate, g);
  return gate.layout ? a * (gate.beta != 0.f ? u + Vec(gate.beta) : u) : a;
}

// --- tiles: c[R][PANEL] = rows[R][depth] * panel[depth][N registers] -----------------------------------------------------------

template <int R, int N>
inline void tile(const float* const* rows, int64_t depth, const float* panel, float* c) {
  Reg sum[R][N];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) sum[i][n] = every(0.f);
  const float* row[R];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) row[i] = rows[i];
  for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
    Reg x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = load(panel + n * W);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const Reg w = every(row[i][k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = plus_product(sum[i][n], w, x[n]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) store(c + i * PANEL + n * W, sum[i][n]);
}

#if EFF_DOT_BF16
template <int R, int N>
void tile(const at::BFloat16* const* rows, int64_t depth, const at::BFloat16* panel, float* c);  // in moe_pairs.h
#endif

template <int R, int N, typename P>
inline void tile_edge(int64_t left, const P* const* rows, int64_t depth, const P* panel, float* c) {
  if (left == R) {
    tile<R, N>(rows, depth, panel, c);
  } else if constexpr (R > 1) {
    tile_edge<R - 1, N, P>(left, rows, depth, panel, c);
  }
}

template <int N, typename P>
void tiles(int64_t count, const P* const* rows, int64_t depth, const P* panel, float* c) {
  constexpr int R = rows_of(N);
  int64_t i = 0;
  for (; i + R <= count; i += R) tile<R, N>(rows + i, depth, panel, c + i * PANEL);
  if (i < count) tile_edge<R, N, P>(count - i, rows + i, depth, panel, c + i * PANEL);
}

// c[count][PANEL] of a panel that holds `tokens` tokens.
template <typename P>
void multiply(int64_t tokens, int64_t count, const P* const* rows, int64_t depth, const P* panel, float* c) {
  const int64_t registers = (tokens + W - 1) / W;
  if (registers == 1) return tiles<1, P>(count, rows, depth, panel, c);
  if (registers == 2 || VECTORS == 2) return tiles<2, P>(count, rows, depth, panel, c);
  if (registers == 3) return tiles<(VECTORS == 4 ? 3 : 2), P>(count, rows, depth, panel, c);
  tiles<VECTORS, P>(count, rows, depth, panel, c);
}

}  // namespace
