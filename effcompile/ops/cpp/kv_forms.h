// Forms of keys and values in whole bytes: how a chunk of tokens becomes scores, and weights a sum of values.

namespace {

struct Rows {  // of one chunk of tokens and all query rows of a key head
  const float* q;
  int64_t rows, depth, width;  // width: channels of a row of values, padded to 16
  float *s, *sums;             // scores or weights [rows, lds]; sums [rows, width]
  int64_t lds;
};

// s[row, token] = sum over channels of q[row, channel] * (16 * high + low), for one panel: high[channel][64], low[channel / 2][64],
// where a byte of the lower plane has an even channel in its low half and the next one in its high half.
template <int R>
void scores_planes(const int8_t* high, const uint8_t* low, int64_t depth, const float* q, float* s, int64_t lds) {
  const Reg sixteen = every(16.f);
  for (int64_t at = 0; at < PANEL8; at += 2 * W) {
    Reg sum[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = every(0.f);
    for (int64_t d = 0; d < depth; d += 2) {
      Reg code[2][2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int8_t* from = high + d * PANEL8 + at + n * W;
        const Ints pair = bytes(low + d / 2 * PANEL8 + at + n * W);
        code[0][n] = plus_product(field<0, 15>(pair), sixteen, signed_codes(from));
        code[1][n] = plus_product(field<4, 15>(pair), sixteen, signed_codes(from + PANEL8));
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i)
        for (int c = 0; c < 2; ++c) {
          const Reg x = every(q[i * depth + d + c]);
          sum[i][0] = plus_product(sum[i][0], x, code[c][0]);
          sum[i][1] = plus_product(sum[i][1], x, code[c][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      store(s + i * lds + at, sum[i][0]);
      store(s + i * lds + at + W, sum[i][1]);
    }
  }
}

// Turn 64 rows of bytes, of which `count` are there, into lines of 64: to[column][64].
void turn(const uint8_t* from, int64_t columns, int64_t count, uint8_t* to) {
  if (count < PANEL8) std::memset(to, 0, columns * PANEL8);
  int64_t first = 0;
#if defined(__SSE2__)
  for (; first + 16 <= columns && count == PANEL8; first += 16)
    for (int64_t t = 0; t < PANEL8; t += 16) {
      __m128i x[16], y[16];
      for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (t + i) * columns + first));
      // Four rounds of interleaving the first half with the second transpose a square of 16.
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {
        for (int i = 0; i < 8; ++i) {
          y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
          y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
      }
      for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (first + i) * PANEL8 + t), x[i]);
    }
#endif
  for (int64_t t = 0; t < count; ++t)
    for (int64_t d = first; d < columns; ++d) to[d * PANEL8 + t] = from[t * columns + d];
}

// Lines of two channels in halves of bytes become two lines of codes each, in place: `lines` of them lie in the upper half of `to`.
inline void split_lines(const uint8_t* from, int64_t lines, int8_t* to) {
  for (int64_t d = 0; d < lines; ++d, from += PANEL8, to += 2 * PANEL8)
    for (int t = 0; t < PANEL8; ++t) {
      const uint8_t pair = from[t];
      to[t] = static_cast<int8_t>((pair & 15) - 8);
      to[PANEL8 + t] = static_cast<int8_t>((pair >> 4) - 8);
    }
}

// s = scores of `count` tokens whose keys are rows of codes; q has been multiplied by the scales of the channels.
template <int BITS>
void scores_rows(const uint8_t* k, const Rows& r, int64_t count, std::vector<uint8_t>& codes) {
  const int64_t columns = BITS == ROWS4 ? r.depth / 2 : r.depth;
  codes.resize((r.depth + columns) * PANEL8);
  for (int64_t j = 0; j < count; j += PANEL8) {
    int8_t* panel = reinterpret_cast<int8_t*>(codes.data());
    if (BITS == ROWS4) {
      turn(k + j * columns, columns, std::min<int64_t>(PANEL8, count - j), codes.data() + r.depth * PANEL8);
      split_lines(codes.data() + r.depth * PANEL8, columns, panel);
    } else {
      turn(k + j * columns, columns, std::min<int64_t>(PANEL8, count - j), codes.data());
    }
    by_rows(r.rows, [&](auto n, int64_t i) { scores8<n.value, 8>(panel, r.depth, 1, r.q + i * r.depth, r.s + i * r.lds + j, r.lds); });
  }
}

// sums += weighted rows of codes, whose scales come later.
template <int BITS>
void values_rows(const uint8_t* v, const Rows& r, int64_t count, std::vector<uint8_t>& codes) {
  constexpr int64_t AT_ONCE = 32;
  codes.resize(AT_ONCE * r.width);
  for (int64_t j = 0; j < count; j += AT_ONCE) {
    const int64_t many = std::min(AT_ONCE, count - j);
    const int8_t* rows = reinterpret_cast<const int8_t*>(v + j * r.width);
    if (BITS == ROWS4) {
      const uint8_t* from = v + j * r.width / 2;
      int8_t* to = reinterpret_cast<int8_t*>(codes.data());
      for (int64_t n = 0; n < many * r.width / 2; ++n) {
        to[2 * n] = static_cast<int8_t>((from[n] & 15) - 8);
        to[2 * n + 1] = static_cast<int8_t>((from[n] >> 4) - 8);
      }
      rows = to;
    }
    by_rows(r.rows, [&](auto n, int64_t i) {
      const float* w = r.s + i * r.lds + j;
      int64_t d = 0;
      for (; d + 4 * W <= r.width; d += 4 * W) values8<n.value, 4, 8>(rows + d, r.width, many, w, r.lds, r.sums + i * r.width + d);
      for (; d < r.width; d += W) values8<n.value, 1, 8>(rows + d, r.width, many, w, r.lds, r.sums + i * r.width + d);
    });
  }
}

}  // namespace
