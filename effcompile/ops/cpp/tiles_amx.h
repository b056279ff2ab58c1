// Products of bfloat16 with the panels of tiles.h on AMX. It comes after tiles.h and amx.h.

namespace {

#if EFF_AMX

// c[16 * M, NR] (+)= a * b, for M of 1 or 2: registers 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b.
template <int M>
inline void tiles(const at::BFloat16* a, int64_t lda, const Pieces<at::BFloat16>& p, float* c, int64_t ldc, const float* alpha) {
  static_assert(NR == 32);
  if (alpha) {
    for (int i = 0; i < 16 * M; ++i) {
      const Reg by = every(alpha[i]);
      store(c + i * ldc, times(load(c + i * ldc), by));
      store(c + i * ldc + W, times(load(c + i * ldc + W), by));
    }
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + W, ldc * 4);
    if constexpr (M == 2) {
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + W, ldc * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (M == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t n = 0; n < p.count; ++n, a += p.step) {
    const at::BFloat16* b = p.b[n];
    const int64_t depth = p.depth[n];
    for (int64_t k = 0; k < depth; k += STEP<at::BFloat16>) {
      _tile_loadd(6, b + k * NR, NR * 4);
      _tile_loadd(7, b + k * NR + NR, NR * 4);
      _tile_loadd(4, a + k, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (M == 2) {
        _tile_loadd(5, a + 16 * lda + k, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + W, ldc * 4);
  if constexpr (M == 2) {
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + W, ldc * 4);
  }
}

// As `panel` of tiles.h, for depths that are multiples of STEP.
template <typename T>
void panel(const TileRegisters& registers, int64_t rows, const T* a, int64_t lda, const Pieces<T>& p, float* c, int64_t ldc,
           const float* alpha) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (registers.on()) {
      for (; i + 32 <= rows; i += 32) tiles<2>(a + i * lda, lda, p, c + i * ldc, ldc, alpha ? alpha + i : nullptr);
      for (; i + 16 <= rows; i += 16) tiles<1>(a + i * lda, lda, p, c + i * ldc, ldc, alpha ? alpha + i : nullptr);
    }
  }
  if (i < rows) panel(rows - i, a + i * lda, lda, p, c + i * ldc, ldc, alpha ? alpha + i : nullptr);
}

#else

template <typename T>
void panel(const TileRegisters&, int64_t rows, const T* a, int64_t lda, const Pieces<T>& p, float* c, int64_t ldc, const float* alpha) {
  panel(rows, a, lda, p, c, ldc, alpha);
}

#endif

}  // namespace
