// The two products of attention with codes of keys and values, which become floats in registers.

namespace {

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

}  // namespace
