// Products of bfloat16 on the matrix unit of Intel processors (AMX), over the panels of tiles.h. It comes after tiles.h.
//
// A tile register holds 16 rows of 64 bytes: 16 x 16 sums, or 16 rows of 32 factors, or 32 of them in pairs for 16 columns, which is
// how tiles.h packs the right factor. Like the processor's dot products it takes denormal factors for zero.

#if EFF_DOT_BF16 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define EFF_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define EFF_AMX 0
#endif

namespace {

// Factors of one step along the sum; both operands are padded with zeros to a multiple of it.
template <typename T>
constexpr int64_t STEP = EFF_AMX && std::is_same_v<T, at::BFloat16> ? 32 : 2;

#if EFF_AMX

// Whether this process may use the tile registers: Linux asks that it say so first.
inline bool may_use_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// Gives a thread tile registers of full size while it lives. Nothing that sets them itself, as torch's products do, may run meanwhile.
class TileRegisters {
 public:
  explicit TileRegisters(bool wanted) : on_(wanted && may_use_tiles()) {
    if (!on_) return;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() {
    if (on_) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  bool on() const { return on_; }

 private:
  bool on_;
};

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

struct TileRegisters {
  explicit TileRegisters(bool) {}
};

template <typename T>
void panel(const TileRegisters&, int64_t rows, const T* a, int64_t lda, const Pieces<T>& p, float* c, int64_t ldc, const float* alpha) {
  panel(rows, a, lda, p, c, ldc, alpha);
}

#endif

}  // namespace
