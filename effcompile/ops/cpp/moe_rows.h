// The two products of one expert with many or a few of its tokens. It comes after moe_tiles.h and before moe.cpp.

namespace {

// Row of the first weight that gives the gate (which = 0) or the other half (1) of inner number i.
inline int64_t place(const Gate& gate, int64_t inner, int64_t i, int which) {
  return gate.layout == 2 ? 2 * i + which : which * inner + i;
}

// Where the weights of an output begin.
template <typename T>
inline const T* head(const Weights<T>& weights, int64_t output) {
  return weights.data + output * (weights.shape.transposed ? 1 : weights.shape.stride);
}

// The same of the gate (which = 0) or the other half (1) of inner number i.
template <typename T>
inline const T* head(const Weights<T>& weights, const Gate& gate, int64_t inner, int64_t i, int which) {
  if (which && weights.up) return weights.up + i * (weights.shape.transposed ? 1 : weights.shape.stride);
  return head(weights, place(gate, inner, i, which));
}

// Point at rows of weights as contiguous numbers: the model's own where they are, else copies. `heads` are where they begin.
template <typename T, typename P>
void ready(const Shape& shape, const T* const* heads, int64_t count, const P** rows, P* space) {
  if constexpr (std::is_same_v<T, P>) {
    if (!shape.transposed) {
      for (int64_t i = 0; i < count; ++i) rows[i] = heads[i];
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) rows[i] = space + i * shape.depth;
  if constexpr (std::is_same_v<P, float>) {
    if (!shape.transposed) {
      for (int64_t i = 0; i < count; ++i) widen(heads[i], shape.depth, space + i * shape.depth);
      return;
    }
  }
  // Columns of a transposed weight; neighbors are read together.
  for (int64_t i = 0; i < count;) {
    int64_t run = 1;
    while (i + run < count && heads[i + run] == heads[i] + run && run < W) ++run;
    const T* from = heads[i];
    P* to = space + i * shape.depth;
    int64_t k = 0;
    if constexpr (std::is_same_v<P, float>) {
      if (run == W) {
        float held[W * W];
        for (; k + W <= shape.depth; k += W) {
          for (int j = 0; j < W; ++j) store(held + j * W, wide(from + (k + j) * shape.stride));
          turn_block(held, W, to + k, shape.depth);
        }
      }
    } else if constexpr (PAIRS<P> && std::is_same_v<T, P>) {
#if EFF_DOT_BF16
      if (run == W) k = turn_columns(from, shape.stride, shape.depth, to);
#endif
    }
    for (; k < shape.depth; ++k)
      for (int64_t j = 0; j < run; ++j) to[j * shape.depth + k] = static_cast<P>(from[k * shape.stride + j]);
    i += run;
  }
}

template <typename T>
inline float bias_of(const Weights<T>& weights, int64_t output) {
  return weights.bias ? static_cast<float>(weights.bias[output]) : 0.f;
}

// --- many tokens -----------------------------------------------------------------------------------------------------------

// The inner numbers i and, of pairs, i + 1, of W tokens, into their panel.
template <typename P, typename F>
inline void put(F value, int64_t i, int64_t n, P* panel) {
  if constexpr (PAIRS<P>) {
#if EFF_DOT_BF16
    store_pair(value(0), value(1), panel + (i / 2) * 2 * PANEL + 2 * n);
#endif
  } else {
    value(0).store(panel + i * PANEL + n);
  }
}

// inner[panel][i][PANEL] = gate(W1 x + b1) for inner rows [low, high) of `tokens` tokens in panels; of pairs low and high are even.
template <typename P, typename T>
void many_first(const Weights<T>& weights, const Gate& gate, int64_t inner, const P* panels, int64_t depth, int64_t tokens, int64_t low,
                int64_t high, P* out, const TileRegisters& registers, Scratch& own) {
  constexpr int64_t most = AT_ONCE<P>, together = PAIRS<P> ? 2 : 1;
  const bool halves = gate.layout != 0;
  const int64_t step = halves ? most / 2 : most;
  const bool copied = !std::is_same_v<T, P> || weights.shape.transposed;
  P* space = reinterpret_cast<P*>(own.weights(copied ? most * depth : 0));
  float* c = own.tile(most * PANEL);
  for (int64_t i = low; i < high; i += step) {
    const int64_t many = std::min(step, high - i);
    const T* heads[most];
    const P *rows[most], *ordered[most];
    // Where they lie next to each other they are read so; the tile takes all gates first.
    const bool pairs = gate.layout == 2;
    for (int64_t j = 0; j < many; ++j) {
      heads[pairs ? 2 * j : j] = head(weights, gate, inner, i + j, 0);
      if (halves) heads[pairs ? 2 * j + 1 : many + j] = head(weights, gate, inner, i + j, 1);
    }
    const int64_t all = halves ? 2 * many : many;
    ready(weights.shape, heads, all, rows, space);
    for (int64_t j = 0; j < many; ++j) {
      ordered[j] = rows[pairs ? 2 * j : j];
      if (halves) ordered[many + j] = rows[pairs ? 2 * j + 1 : many + j];
    }
    for (int64_t begin = 0; begin < tokens; begin += PANEL) {
      const int64_t here = std::min(PANEL, tokens - begin);
      multiply(registers, here, all, ordered, depth, panels + begin * depth, c);
      for (int64_t j = 0; j < many; j += together) {
        for (int64_t n = 0; n < here; n += W) {
          auto value = [&](int64_t more) {
            const int64_t at = j + more;
            const Vec g = Vec::loadu(c + at * PANEL + n) + Vec(bias_of(weights, place(gate, inner, i + at, 0)));
            const Vec u = halves ? Vec::loadu(c + (many + at) * PANEL + n) + Vec(bias_of(weights, place(gate, inner, i + at, 1))) : g;
            return combined(gate, g, u);
          };
          put(value, i + j, n, out + begin * inner);
        }
      }
    }
  }
}

// take(token, first output, values, count) gets W2 inner + b2 for outputs [low, high).
template <typename P, typename T, typename F>
void many_second(const Weights<T>& weights, const P* panels, int64_t depth, int64_t tokens, int64_t low, int64_t high,
                 const TileRegisters& registers, Scratch& own, F take) {
  constexpr int64_t most = AT_ONCE<P>;
  const bool copied = !std::is_same_v<T, P> || weights.shape.transposed;
  P* space = reinterpret_cast<P*>(own.weights(copied ? most * depth : 0));
  float* c = own.tile((most + W) * PANEL + PANEL * most);
  float* turned = c + (most + W) * PANEL;
  for (int64_t h = low; h < high; h += most) {
    const int64_t many = std::min(most, high - h);
    const T* heads[most];
    const P* rows[most];
    for (int64_t j = 0; j < many; ++j) heads[j] = head(weights, h + j);
    ready(weights.shape, heads, many, rows, space);
    for (int64_t begin = 0; begin < tokens; begin += PANEL) {
      const int64_t here = std::min(PANEL, tokens - begin);
      multiply(registers, here, many, rows, depth, panels + begin * depth, c);
      if (weights.bias)
        for (int64_t j = 0; j < many; ++j) {
          const Reg b = every(bias_of(weights, h + j));
          for (int64_t n = 0; n < here; n += W) store(c + j * PANEL + n, add(load(c + j * PANEL + n), b));
        }
      for (int64_t j = 0; j < many; j += W)
        for (int64_t n = 0; n < here; n += W) turn_block(c + j * PANEL + n, PANEL, turned + n * most + j, most);
      for (int64_t i = 0; i < here; ++i) take(begin + i, h, turned + i * most, many);
    }
  }
}

// --- a few tokens: rows of weights times rows of tokens ------------------------------------------------------------------------

// `ahead` is the way to the rows that are multiplied next: the processor's own prefetching ends with each row.
template <int R, int N, typename T>
inline void dots(const T* const* w, const float* const* x, int64_t depth, int64_t ahead, float (*out)[N]) {
  Reg sum[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) sum[i][n] = every(0.f);
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    Reg tokens[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) tokens[n] = load(x[n] + k);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Reg weight = wide(w[i] + k);
      __builtin_prefetch(w[i] + k + ahead, 0, 2);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[i][n] = plus_product(sum[i][n], weight, tokens[n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int n = 0; n < N; ++n) {
      out[i][n] = total(sum[i][n]);
      for (int64_t rest = k; rest < depth; ++rest) out[i][n] += static_cast<float>(w[i][rest]) * x[n][rest];
    }
}

constexpr int rows_for(int n) { return W == 16 ? (n <= 2 ? 8 : n <= 4 ? 4 : 2) : n <= 2 ? 4 : 2; }

// c[row * N + token] for `count` rows of weights.
template <int N, typename T>
void dot_rows(const T* data, int64_t stride, int64_t count, const float* x, int64_t depth, float* c) {
  constexpr int R = rows_for(N);
  const float* tokens[N];
  for (int n = 0; n < N; ++n) tokens[n] = x + n * depth;
  int64_t i = 0;
  const T* w[R];
  for (; i + R <= count; i += R) {
    for (int r = 0; r < R; ++r) w[r] = data + (i + r) * stride;
    dots<R, N>(w, tokens, depth, i + 2 * R <= count ? R * stride : 0, reinterpret_cast<float(*)[N]>(c + i * N));
  }
  for (; i < count; ++i) {
    w[0] = data + i * stride;
    dots<1, N>(w, tokens, depth, 0, reinterpret_cast<float(*)[N]>(c + i * N));
  }
}

// c[token][count] for outputs [low, low + count) of a transposed weight: four rows of the weight at a time, from end to end, so that
// they are read in the order in which they lie; the sums stay in the nearest cache.
template <int N, typename T>
void column_sums(const Weights<T>& weights, int64_t low, int64_t count, const float* x, float* c) {
  constexpr int ROWS = 4;
  const int64_t depth = weights.shape.depth, stride = weights.shape.stride;
  std::fill(c, c + count * N, 0.f);
  int64_t k = 0;
  for (; k + ROWS <= depth; k += ROWS) {
    const T* from = weights.data + k * stride + low;
    const int64_t ahead = k + 2 * ROWS <= depth ? ROWS * stride : 0;
    int64_t j = 0;
    for (; j + W <= count; j += W) {
      Reg w[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        w[r] = wide(from + r * stride + j);
        __builtin_prefetch(from + r * stride + j + ahead, 0, 2);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        Reg sum = load(c + n * count + j);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sum = plus_product(sum, w[r], every(x[n * depth + k + r]));
        store(c + n * count + j, sum);
      }
    }
    for (; j < count; ++j)
      for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) c[n * count + j] += static_cast<float>(from[r * stride + j]) * x[n * depth + k + r];
  }
  for (; k < depth; ++k)
    for (int n = 0; n < N; ++n)
      for (int64_t j = 0; j < count; ++j)
        c[n * count + j] += static_cast<float>(weights.data[k * stride + low + j]) * x[n * depth + k];
}

// Outputs [low, low + count): c[output * N + token], or c[token][count] where the weight is transposed.
template <int N, typename T>
void outputs(const Weights<T>& weights, int64_t low, int64_t count, const float* x, float* c) {
  if (weights.shape.transposed) return column_sums<N>(weights, low, count, x, c);
  dot_rows<N>(weights.data + low * weights.shape.stride, weights.shape.stride, count, x, weights.shape.depth, c);
}

template <int N, typename T>
void few_first_of(const Weights<T>& weights, const Gate& gate, int64_t inner, const float* x, int64_t low, int64_t high, float* out,
                  Scratch& own) {
  const int64_t many = high - low, halves = gate.layout ? 2 : 1;
  float* c = own.tile(halves * many * N + 4 * W * N);
  float *g = own.gates(2 * many + 2 * W), *u = g + many + W;
  const bool pairs = gate.layout == 2;
  if (pairs) {
    outputs<N>(weights, 2 * low, 2 * many, x, c);
  } else {
    outputs<N>(weights, low, many, x, c);
    Weights<T> others = weights;
    if (weights.up) others.data = weights.up;
    if (halves == 2) outputs<N>(others, weights.up ? low : inner + low, many, x, c + many * N);
  }
  const int64_t run = pairs ? 2 * many : many;  // outputs that were computed at once
  const int64_t by_token = weights.shape.transposed ? run : 1, by_output = weights.shape.transposed ? 1 : N;
  for (int n = 0; n < N; ++n) {
    const float* from = c + n * by_token;
    for (int64_t i = 0; i < many; ++i) {
      g[i] = from[(pairs ? 2 * i : i) * by_output] + bias_of(weights, place(gate, inner, low + i, 0));
      if (halves == 2) u[i] = from[pairs ? (2 * i + 1) * by_output : many * N + i * by_output] + bias_of(weights, place(gate, inner, low + i, 1));
    }
    int64_t i = 0;
    float* to = out + n * inner + low;
    for (; i + W <= many; i += W) combined(gate, Vec::loadu(g + i), Vec::loadu(u + i)).store(to + i);
    if (i < many) combined(gate, Vec::loadu(g + i, many - i), Vec::loadu(u + i, many - i)).store(to + i, many - i);
  }
}

template <int N, typename T, typename F>
void few_second_of(const Weights<T>& weights, const float* x, int64_t low, int64_t high, Scratch& own, F take) {
  const int64_t many = high - low;
  float* c = own.tile(many * N + 4 * W * N);
  outputs<N>(weights, low, many, x, c);
  const int64_t by_token = weights.shape.transposed ? many : 1, by_output = weights.shape.transposed ? 1 : N;
  for (int n = 0; n < N; ++n)
    for (int64_t i = 0; i < many; ++i) take(n, low + i, c[n * by_token + i * by_output] + bias_of(weights, low + i));
}

// inner rows out[token][inner] = gate(W1 x + b1), for inner rows [low, high).
template <typename T>
void few_first(const Weights<T>& weights, const Gate& gate, int64_t inner, const float* x, int64_t depth, int64_t tokens, int64_t low,
               int64_t high, float* out, Scratch& own) {
  static_assert(FEW == 8);
  switch (tokens) {
    case 1: return few_first_of<1>(weights, gate, inner, x, low, high, out, own);
    case 2: return few_first_of<2>(weights, gate, inner, x, low, high, out, own);
    case 3: return few_first_of<3>(weights, gate, inner, x, low, high, out, own);
    case 4: return few_first_of<4>(weights, gate, inner, x, low, high, out, own);
    case 5: return few_first_of<5>(weights, gate, inner, x, low, high, out, own);
    case 6: return few_first_of<6>(weights, gate, inner, x, low, high, out, own);
    case 7: return few_first_of<7>(weights, gate, inner, x, low, high, out, own);
    default: return few_first_of<8>(weights, gate, inner, x, low, high, out, own);
  }
}

template <typename T, typename F>
void few_second(const Weights<T>& weights, const float* x, int64_t depth, int64_t tokens, int64_t low, int64_t high, Scratch& own, F take) {
  switch (tokens) {
    case 1: return few_second_of<1>(weights, x, low, high, own, take);
    case 2: return few_second_of<2>(weights, x, low, high, own, take);
    case 3: return few_second_of<3>(weights, x, low, high, own, take);
    case 4: return few_second_of<4>(weights, x, low, high, own, take);
    case 5: return few_second_of<5>(weights, x, low, high, own, take);
    case 6: return few_second_of<6>(weights, x, low, high, own, take);
    case 7: return few_second_of<7>(weights, x, low, high, own, take);
    default: return few_second_of<8>(weights, x, low, high, own, take);
  }
}

}  // namespace
