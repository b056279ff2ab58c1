// Linear layers of a few rows on CPU. effcompile/ops/native.py compiles this once, with TorchInductor's flags, and calls it.
//
// A step of decoding reads every weight once and does next to nothing with it: the rate is that of memory, if only every core reads.
// Rows of the weight are read side by side, so that each core has several streams, and meet all rows of x while they are in
// registers. No result depends on the number of threads.

namespace {

constexpr int MOST = 8;  // rows of x

template <int M, int R>
inline void dots(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t depth, float* out, int64_t ldo) {
  Reg sum[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[r][m] = every(0.f);
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    Reg in[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) in[m] = load(x + m * ldx + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Reg weight = load(w + r * ldw + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[r][m] = plus_product(sum[r][m], weight, in[m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float whole = total(sum[r][m]);
      for (int64_t j = k; j < depth; ++j) whole += w[r * ldw + j] * x[m * ldx + j];
      out[m * ldo + r] = whole;
    }
}

#if defined(CPU_CAPABILITY_AVX512)
inline __m512 widened(const at::BFloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
#endif

template <int M, int R>
inline void dots(const at::BFloat16* x, int64_t ldx, const at::BFloat16* w, int64_t ldw, int64_t depth, float* out, int64_t ldo) {
  int64_t k = 0;
  float whole[R][M] = {};
#if EFF_DOT_BF16
  __m512 sum[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  for (; k + 32 <= depth; k += 32) {
    __m512bh in[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) in[m] = (__m512bh)_mm512_loadu_si512(x + m * ldx + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh weight = (__m512bh)_mm512_loadu_si512(w + r * ldw + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], weight, in[m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) whole[r][m] = _mm512_reduce_add_ps(sum[r][m]);
#elif defined(CPU_CAPABILITY_AVX512)
  __m512 sum[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  for (; k + 16 <= depth; k += 16) {
    __m512 in[M];
    for (int m = 0; m < M; ++m) in[m] = widened(x + m * ldx + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 weight = widened(w + r * ldw + k);
      for (int m = 0; m < M; ++m) sum[r][m] = _mm512_fmadd_ps(weight, in[m], sum[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) whole[r][m] = _mm512_reduce_add_ps(sum[r][m]);
#endif
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      for (int64_t j = k; j < depth; ++j) whole[r][m] += static_cast<float>(w[r * ldw + j]) * static_cast<float>(x[m * ldx + j]);
      out[m * ldo + r] = whole[r][m];
    }
}

template <typename T, int M>
void some(const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* out, int64_t ldo, int64_t begin, int64_t end, int64_t depth) {
  constexpr int R = M <= 4 ? 4 : 2;
  float found[M * R];
  const auto keep = [&](int64_t n, int many) {
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < many; ++r)
        out[m * ldo + n + r] = static_cast<T>(found[m * R + r] + (bias ? static_cast<float>(bias[n + r]) : 0.f));
  };
  int64_t n = begin;
  for (; n + R <= end; n += R) {
    dots<M, R>(x, ldx, w + n * ldw, ldw, depth, found, R);
    keep(n, R);
  }
  for (; n < end; ++n) {
    dots<M, 1>(x, ldx, w + n * ldw, ldw, depth, found, R);
    keep(n, 1);
  }
}

template <typename T>
void run(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t outputs, int64_t depth, int64_t ldw, int64_t threads) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, outputs * depth / 32768));
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = up(outputs * part / parts, 4), end = part + 1 == parts ? outputs : up(outputs * (part + 1) / parts, 4);
    switch (rows) {
      case 1: some<T, 1>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 2: some<T, 2>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 3: some<T, 3>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 4: some<T, 4>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 5: some<T, 5>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 6: some<T, 6>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      case 7: some<T, 7>(x, depth, w, ldw, bias, out, outputs, begin, end, depth); break;
      default: some<T, MOST>(x, depth, w, ldw, bias, out, outputs, begin, end, depth);
    }
  }
}

}  // namespace

// dtype: 0 float, 1 bfloat16. sizes: rows (1 to MOST), outputs, inputs, stride of a row of the weight, threads.
// pointers: x [rows, inputs], weight [outputs, inputs], bias [outputs] or null, out [rows, outputs].
extern "C" void eff_linear_rows(int64_t dtype, const int64_t* sizes, const void* const* pointers) {
  const auto call = [&](auto zero) {
    using T = decltype(zero);
    run(static_cast<const T*>(pointers[0]), static_cast<const T*>(pointers[1]), static_cast<const T*>(pointers[2]),
        static_cast<T*>(const_cast<void*>(pointers[3])), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  };
  if (dtype == 0) {
    call(0.f);
  } else {
    call(at::BFloat16(0.f));
  }
}
