// Products of register tiles on CPU, and the packing of their operands. It comes after registers.h and before the sources that use it.
//
// The right factor is packed into panels of NR columns, so that a tile of MR x NR results stays in registers; products of bfloat16
// run on dot-product instructions where the processor has them, else in float.

namespace {

constexpr int NR = 2 * W;
constexpr int MR = W == 16 ? 12 : W == 8 ? 6 : 8;

// A product of `count` pieces: c[rows, NR] (+)= sum over n of a[rows, n * step ...] * b[n][depth[n], NR].
template <typename T>
struct Pieces {
  const T* const* b;
  const int32_t* depth;
  int64_t count, step;
};

// --- tiles of M x NR results; `alpha` scales what c holds, null overwrites it ------------------------------------------------

template <int M>
inline void begin(Reg (&sum)[M][2], const float* c, int64_t ldc, const float* alpha) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    sum[i][0] = alpha ? times(load(c + i * ldc), every(alpha[i])) : every(0.f);
    sum[i][1] = alpha ? times(load(c + i * ldc + W), every(alpha[i])) : every(0.f);
  }
}

template <int M>
inline void end(const Reg (&sum)[M][2], float* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(c + i * ldc, sum[i][0]);
    store(c + i * ldc + W, sum[i][1]);
  }
}

template <int M>
inline void tile(const float* a, int64_t lda, const Pieces<float>& p, float* c, int64_t ldc, const float* alpha) {
  Reg sum[M][2];
  begin<M>(sum, c, ldc, alpha);
  for (int64_t n = 0; n < p.count; ++n, a += p.step) {
    const float* b = p.b[n];
    const int64_t depth = p.depth[n];
    for (int64_t k = 0; k < depth; ++k) {
      const Reg b0 = load(b + k * NR), b1 = load(b + k * NR + W);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Reg x = every(a[i * lda + k]);
        sum[i][0] = plus_product(sum[i][0], x, b0);
        sum[i][1] = plus_product(sum[i][1], x, b1);
      }
    }
  }
  end<M>(sum, c, ldc);
}

#if EFF_DOT_BF16
template <int M>
inline void tile(const at::BFloat16* a, int64_t lda, const Pieces<at::BFloat16>& p, float* c, int64_t ldc, const float* alpha) {
  Reg sum[M][2];
  begin<M>(sum, c, ldc, alpha);
  for (int64_t n = 0; n < p.count; ++n, a += p.step) {
    const at::BFloat16* b = p.b[n];
    const int64_t depth = p.depth[n];
    for (int64_t k = 0; k < depth; k += 2) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * NR), b1 = (__m512bh)_mm512_loadu_si512(b + k * NR + NR);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a + i * lda + k));
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
      }
    }
  }
  end<M>(sum, c, ldc);
}
#endif

template <int M, typename T>
inline void edge(int64_t left, const T* a, int64_t lda, const Pieces<T>& p, float* c, int64_t ldc, const float* alpha) {
  if (left == M) {
    tile<M>(a, lda, p, c, ldc, alpha);
  } else if constexpr (M > 1) {
    edge<M - 1>(left, a, lda, p, c, ldc, alpha);
  }
}

template <typename T>
void panel(int64_t rows, const T* a, int64_t lda, const Pieces<T>& p, float* c, int64_t ldc, const float* alpha) {
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) tile<MR>(a + i * lda, lda, p, c + i * ldc, ldc, alpha ? alpha + i : nullptr);
  if (i < rows) edge<MR>(rows - i, a + i * lda, lda, p, c + i * ldc, ldc, alpha ? alpha + i : nullptr);
}

// Where the rows of a matrix begin: `stride` apart, and one after another or where `order` says.
struct Rows {
  int64_t stride;
  const int32_t* order = nullptr;
  Rows(int64_t stride, const int32_t* order = nullptr) : stride(stride), order(order) {}
  int64_t operator[](int64_t n) const { return (order ? order[n] : n) * stride; }
};

// --- packing: panels [n / NR][depth][NR] of float, or [n / NR][depth / 2][NR][2] of bfloat16 -------------------------------

inline int64_t place(float, int64_t depth, int64_t k, int64_t n) { return (n / NR) * depth * NR + k * NR + n % NR; }
inline int64_t place(at::BFloat16, int64_t depth, int64_t k, int64_t n) {
  return (n / NR) * depth * NR + (k / 2) * 2 * NR + (n % NR) * 2 + k % 2;
}

// Columns of the panel are positions: the transpose of `source`.
template <typename S, typename T>
void pack_keys(const S* source, const Rows& rows, int64_t count, int64_t width, int64_t depth, int64_t block, T* out) {
  constexpr bool pairs = std::is_same_v<T, at::BFloat16>;
  if (count < up(block, NR) || width < depth) std::fill(out, out + depth * up(block, NR), T(0));
  for (int64_t n = 0; n < count; n += NR) {
    T* to = out + place(T(0), depth, 0, n);
    const int64_t many = std::min<int64_t>(NR, count - n);
    const S* from[NR];
    for (int64_t i = 0; i < many; ++i) from[i] = source + rows[n + i];
    int64_t k = 0;
    if constexpr (pairs && std::is_same_v<S, T>) {
      for (; k + 2 <= width; k += 2)  // two neighbors at a time
        for (int64_t i = 0; i < many; ++i) std::memcpy(to + k * NR + 2 * i, from[i] + k, 2 * sizeof(T));
    }
    for (; k < width; ++k) {
      T* line = to + (pairs ? (k / 2) * 2 * NR + k % 2 : k * NR);
      for (int64_t i = 0; i < many; ++i) line[pairs ? 2 * i : i] = static_cast<T>(static_cast<float>(from[i][k]));
    }
  }
}

// Columns of the panel are the components of a value; a panel is `depth` deep, at least the block.
template <typename S, typename T>
void pack_values(const S* source, const Rows& rows, int64_t count, int64_t width, int64_t depth, T* out) {
  constexpr int step = std::is_same_v<T, at::BFloat16> ? 2 : 1;
  const int64_t wide = up(width, NR);
  if (count < depth || width < wide) std::fill(out, out + wide * depth, T(0));
  int64_t k = 0;
  if constexpr (step == 2 && std::is_same_v<S, T>) {
    for (; k + 2 <= count; k += 2) {
      const T *even = source + rows[k], *odd = source + rows[k + 1];
      for (int64_t n = 0; n < width; n += NR) {
        T* to = out + place(T(0), depth, k, n);
        const int64_t many = std::min<int64_t>(NR, width - n);
        for (int64_t i = 0; i < many; ++i) {
          to[2 * i] = even[n + i];
          to[2 * i + 1] = odd[n + i];
        }
      }
    }
  }
  for (; k < count; ++k) {
    const S* row = source + rows[k];
    for (int64_t n = 0; n < width; n += NR) {
      T* to = out + place(T(0), depth, k, n);
      const int64_t many = std::min<int64_t>(NR, width - n);
      if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
        std::copy(row + n, row + n + many, to);
      } else {
        for (int64_t i = 0; i < many; ++i) to[i * step] = static_cast<T>(static_cast<float>(row[n + i]));
      }
    }
  }
}

}  // namespace
