// The matrix unit of Intel processors (AMX): permission to use its registers, and their shape. It comes after registers.h.
//
// A tile register holds 16 rows of 64 bytes: 16 x 16 sums of float, or 16 rows of 32 factors of bfloat16, or 32 of them in pairs for 16
// columns. Like the processor's dot products it takes denormal factors for zero.

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

#else

struct TileRegisters {
  explicit TileRegisters(bool) {}
};

#endif

}  // namespace
