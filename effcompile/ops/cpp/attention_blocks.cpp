// Attention over a block map on CPU. effcompile/ops/native.py compiles this once, with TorchInductor's flags, and calls it.
//
// One pass over the kept blocks of each block of queries, several at a time, with running maximum and sum. No result depends on the
// number of threads. The products are those of tiles.h and tiles_amx.h. Where tokens have an order of their own, blocks and masks are
// those of its places: queries and keys are read through it and results written back, so that nothing is copied before or behind.

namespace {

constexpr int CHUNK = 256;  // columns of scores that exist at a time

struct Problem {
  int64_t batch, heads, kv_heads, rows, columns, depth, width, q_block, k_block;
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];  // batch, head, position; the last dimension is contiguous
  int64_t map_batch, map_heads, mask_batch, mask_heads, limit_batch, pad_batch, tile_batch, tile_heads, order_batch,
      order_heads;
  int64_t q_blocks, k_blocks, threads;
  const uint8_t* chosen;   // [map_batch, map_heads, q_blocks, k_blocks]: blocks to compute
  const uint8_t* some;     // [mask_batch, mask_heads, q_blocks, k_blocks]: some pair of the block may be kept
  const uint8_t* whole;    // the same shape: every pair of the block is kept
  const int32_t* first;    // [limit_batch, rows]: least kept key, or null
  const int32_t* last;     // [limit_batch, rows]: largest kept key, or null
  const uint8_t* pad;      // [pad_batch, columns]: kept keys, or null
  const int32_t* tile_of;  // [tile_batch, tile_heads, q_blocks, k_blocks]: number of a tile or -1; or null
  const uint8_t* tiles;    // [tiles, q_block, k_block]
  const float* row_scale;  // [batch, heads, rows]: factor of each row of the result, or null
  const void* addend;      // [batch, heads, rows, width], of the result's type: added to it, or null
  const int32_t* q_order;  // [order_batch, order_heads, rows]: the query at each place, or null
  const int32_t* k_order;  // [order_batch, order_heads, columns]: the key at each place, or null
  float scale;
};

// The tokens at the places of a sequence and head from `at` on, `extent` to a head; null where they lie in order.
const int32_t* tokens(const Problem& p, const int32_t* order, int64_t extent, int64_t b, int64_t h, int64_t at) {
  return order ? order + ((b % p.order_batch) * p.order_heads + h % p.order_heads) * extent + at : nullptr;
}

// --- one block of queries ----------------------------------------------------------------------------------------------------

struct Scratch {
  std::vector<float> scores, sums, largest, total, alpha;
  std::vector<char> queries, probs;
  std::vector<const void*> pieces;
  std::vector<int32_t> depths, list;
};

void mask_tile(const Problem& p, int64_t b, int64_t h, int64_t qb, int64_t kb, int64_t rows, int64_t count, float* s, int64_t lds) {
  const int64_t begin = kb * p.k_block;
  const int32_t* first = p.first ? p.first + (b % p.limit_batch) * p.rows + qb * p.q_block : nullptr;
  const int32_t* last = p.last ? p.last + (b % p.limit_batch) * p.rows + qb * p.q_block : nullptr;
  const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns + begin : nullptr;
  const uint8_t* bits = nullptr;
  if (p.tile_of) {
    const int64_t at = (((b % p.tile_batch) * p.tile_heads + h % p.tile_heads) * p.q_blocks + qb) * p.k_blocks + kb;
    if (p.tile_of[at] >= 0) bits = p.tiles + static_cast<int64_t>(p.tile_of[at]) * p.q_block * p.k_block;
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s + i * lds;
    const int64_t low = first ? std::clamp<int64_t>(first[i] - begin, 0, count) : 0;
    const int64_t high = last ? std::clamp<int64_t>(static_cast<int64_t>(last[i]) + 1 - begin, 0, count) : count;
    for (int64_t j = 0; j < std::min(low, count); ++j) row[j] = NEG;
    for (int64_t j = high; j < count; ++j) row[j] = NEG;
    if (pad)
      for (int64_t j = 0; j < count; ++j) row[j] = pad[j] ? row[j] : NEG;
    if (bits)
      for (int64_t j = 0; j < count; ++j) row[j] = bits[i * p.k_block + j] ? row[j] : NEG;
  }
}

inline void store_row(float* to, const Vec& value, int64_t at) { value.store(to + at); }
#if EFF_DOT_BF16
inline void store_row(at::BFloat16* to, const Vec& value, int64_t at) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at), (__m256i)_mm512_cvtneps_pbh(value));
}
#endif

// How wide the scores of a chunk are: blocks are taken together until they have this many columns.
int64_t chunk_of(const Problem& p) { return std::max<int64_t>(1, CHUNK / up(p.k_block, NR)); }

template <typename S, typename T>
void attend(const Problem& p, const S* q, const T* keys, const T* values, S* out, float* lse, int64_t b, int64_t h, int64_t qb,
            const TileRegisters& registers, Scratch& own) {
  const int64_t rows = std::min(p.q_block, p.rows - qb * p.q_block);
  const int64_t depth = up(p.depth, STEP<T>), wide = up(p.width, NR), each = up(p.k_block, NR), deep = up(p.k_block, STEP<T>);
  const int64_t most = chunk_of(p), lds = most * each + W;
  T* queries = reinterpret_cast<T*>(own.queries.data());
  float *scores = own.scores.data(), *sums = own.sums.data();
  // Probabilities of float replace their scores; narrower ones have rows of their own.
  T* probs = std::is_same_v<T, float> ? reinterpret_cast<T*>(scores) : reinterpret_cast<T*>(own.probs.data());
  float *largest = own.largest.data(), *total = own.total.data(), *alpha = own.alpha.data();
  const T** pieces = reinterpret_cast<const T**>(own.pieces.data());
  int32_t* depths = own.depths.data();
  const int64_t start = qb * p.q_block;
  const int32_t* mine = tokens(p, p.q_order, p.rows, b, h, start);
  const auto token = [&](int64_t i) { return mine ? mine[i] : start + i; };
  const S* from = q + b * p.q_stride[0] + h * p.q_stride[1];
  for (int64_t i = 0; i < rows; ++i) {
    const S* row = from + token(i) * p.q_stride[2];
    if constexpr (std::is_same_v<S, T>) {
      std::copy(row, row + p.depth, queries + i * depth);
    } else {
      for (int64_t k = 0; k < p.depth; ++k) queries[i * depth + k] = static_cast<T>(static_cast<float>(row[k]));
    }
    for (int64_t k = p.depth; k < depth; ++k) queries[i * depth + k] = T(0);
  }
  std::fill(largest, largest + rows, NEG);
  std::fill(total, total + rows, 0.f);
  std::fill(sums, sums + rows * wide, 0.f);
  const uint8_t* chosen =
      p.chosen + (((b % p.map_batch) * p.map_heads + h * p.map_heads / p.heads) * p.q_blocks + qb) * p.k_blocks;
  const int64_t mask = (((b % p.mask_batch) * p.mask_heads + h % p.mask_heads) * p.q_blocks + qb) * p.k_blocks;
  const uint8_t *some = p.some + mask, *whole = p.whole + mask;
  int64_t left = 0;
  for (int64_t n = 0; n < p.k_blocks; ++n)
    if (chosen[n] && some[n]) own.list[left++] = static_cast<int32_t>(n);
  const Vec scale(p.scale);
  const int32_t full = static_cast<int32_t>(depth);
  for (int64_t n = 0; n < left; n += most) {
    const int64_t many = std::min(most, left - n), width = many * each;
    const int32_t* list = own.list.data() + n;
    for (int64_t m = 0; m < many; ++m) {
      const int64_t kb = list[m], count = std::min(p.k_block, p.columns - kb * p.k_block);
      float* s = scores + m * each;
      for (int64_t j = 0; j < each; j += NR) {
        const T* key = keys + kb * depth * each + j * depth;
        panel(registers, rows, queries, depth, Pieces<T>{&key, &full, 1, 0}, s + j, lds, nullptr);
      }
      if (!whole[kb]) mask_tile(p, b, h, qb, kb, rows, count, s, lds);
      if (count < each)
        for (int64_t i = 0; i < rows; ++i) std::fill(s + i * lds + count, s + i * lds + each, NEG);
      depths[m] = static_cast<int32_t>(up(count, STEP<T>));
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scores + i * lds;
      T* prob = probs + i * lds;
      Vec most_of(NEG);
      for (int64_t j = 0; j < width; j += W) most_of = at::vec::maximum(most_of, Vec::loadu(row + j));
      float top = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most_of);
      top = std::max(largest[i], top * p.scale);  // the scale is positive
      const float shift = top == NEG ? 0.f : top;
      const Vec by(-shift);
      Vec sum(0.f);
      for (int64_t j = 0; j < width; j += W) {
        const Vec e = at::vec::fmadd(Vec::loadu(row + j), scale, by).exp_u20();
        sum = sum + e;
        store_row(prob, e, j);
      }
      alpha[i] = std::exp(largest[i] - shift);
      total[i] = total[i] * alpha[i] + at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
      largest[i] = top;
    }
    for (int64_t j = 0; j < wide; j += NR) {
      for (int64_t m = 0; m < many; ++m) pieces[m] = values + list[m] * deep * wide + j * deep;
      panel(registers, rows, probs, lds, Pieces<T>{pieces, depths, many, each}, sums + j, wide, n ? alpha : nullptr);
    }
  }
  S* to = out + b * p.o_stride[0] + h * p.o_stride[1];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = token(i), line = (b * p.heads + h) * p.rows + at;
    const S* more = p.addend ? static_cast<const S*>(p.addend) + line * p.width : nullptr;
    const float by = (total[i] > 0.f ? 1.f / total[i] : 0.f) * (p.row_scale ? p.row_scale[line] : 1.f);
    S* row = to + at * p.o_stride[2];
    if (more) {
      for (int64_t j = 0; j < p.width; ++j) row[j] = static_cast<S>(sums[i * wide + j] * by + static_cast<float>(more[j]));
    } else {
      for (int64_t j = 0; j < p.width; ++j) row[j] = static_cast<S>(sums[i * wide + j] * by);
    }
    lse[line] = total[i] > 0.f ? largest[i] + std::log(total[i]) : NEG;
  }
}

// Whether any block of queries of a group of heads reads a block of keys: a decode step packs the few pages that it reads.
bool is_read(const Problem& p, int64_t b, int64_t g, int64_t kb) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    const uint8_t* chosen = p.chosen + ((b % p.map_batch) * p.map_heads + h * p.map_heads / p.heads) * p.q_blocks * p.k_blocks + kb;
    const uint8_t* some = p.some + ((b % p.mask_batch) * p.mask_heads + h % p.mask_heads) * p.q_blocks * p.k_blocks + kb;
    for (int64_t qb = 0; qb < p.q_blocks; ++qb)
      if (chosen[qb * p.k_blocks] && some[qb * p.k_blocks]) return true;
  }
  return false;
}

template <typename S, typename T>
void run(const Problem& p, const void* q_, const void* k_, const void* v_, void* out_, float* lse) {
  const S *q = static_cast<const S*>(q_), *k = static_cast<const S*>(k_), *v = static_cast<const S*>(v_);
  S* out = static_cast<S*>(out_);
  const int64_t depth = up(p.depth, STEP<T>), wide = up(p.width, NR), group = p.heads / p.kv_heads, each = up(p.k_block, NR);
  const int64_t deep = up(p.k_block, STEP<T>), key_block = depth * each, value_block = deep * wide, lds = chunk_of(p) * each + W;
  std::vector<T> keys(p.k_blocks * key_block), values(p.k_blocks * value_block);
#pragma omp parallel num_threads(p.threads)
  {
    const TileRegisters registers(std::is_same_v<T, at::BFloat16> && p.q_block >= 16);
    Scratch own;
    own.scores.resize(p.q_block * lds);
    own.probs.resize(p.q_block * lds * sizeof(T));
    own.queries.resize(p.q_block * depth * sizeof(T));
    own.sums.resize(p.q_block * wide);
    own.largest.resize(p.q_block);
    own.total.resize(p.q_block);
    own.alpha.resize(p.q_block);
    own.pieces.resize(chunk_of(p));
    own.depths.resize(chunk_of(p));
    own.list.resize(p.k_blocks);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t g = 0; g < p.kv_heads; ++g) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p.k_blocks; ++n) {
          if (!is_read(p, b, g, n)) continue;
          const int64_t count = std::min(p.k_block, p.columns - n * p.k_block), at = n * p.k_block;
          const int32_t* order = tokens(p, p.k_order, p.columns, b, g, at);
          const int64_t first = order ? 0 : at;
          pack_keys(k + b * p.k_stride[0] + g * p.k_stride[1] + first * p.k_stride[2], Rows(p.k_stride[2], order), count, p.depth,
                    depth, p.k_block, keys.data() + n * key_block);
          pack_values(v + b * p.v_stride[0] + g * p.v_stride[1] + first * p.v_stride[2], Rows(p.v_stride[2], order), count, p.width,
                      deep, values.data() + n * value_block);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < group * p.q_blocks; ++n) {
          // Late queries read most keys under a causal mask: they go first, so that no long one is left for the end.
          const int64_t qb = p.q_blocks - 1 - n / group, h = g * group + n % group;
          attend(p, q, keys.data(), values.data(), out, lse, b, h, qb, registers, own);
        }
      }
    }
  }
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half. `sizes` and `pointers` are in the order in which Problem is filled below.
extern "C" void eff_attention_blocks(int64_t dtype, const int64_t* sizes, const void* const* pointers, float scale) {
  Problem p{};
  int64_t at = 0;
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.columns, &p.depth, &p.width, &p.q_block, &p.k_block}) *field = sizes[at++];
  for (int64_t* stride : {p.q_stride, p.k_stride, p.v_stride, p.o_stride})
    for (int i = 0; i < 3; ++i) stride[i] = sizes[at++];
  for (int64_t* field : {&p.map_batch, &p.map_heads, &p.mask_batch, &p.mask_heads, &p.limit_batch, &p.pad_batch, &p.tile_batch,
                         &p.tile_heads, &p.order_batch, &p.order_heads, &p.threads})
    *field = sizes[at++];
  p.q_blocks = (p.rows + p.q_block - 1) / p.q_block;
  p.k_blocks = (p.columns + p.k_block - 1) / p.k_block;
  p.scale = scale;
  p.chosen = static_cast<const uint8_t*>(pointers[5]);
  p.some = static_cast<const uint8_t*>(pointers[6]);
  p.whole = static_cast<const uint8_t*>(pointers[7]);
  p.first = static_cast<const int32_t*>(pointers[8]);
  p.last = static_cast<const int32_t*>(pointers[9]);
  p.pad = static_cast<const uint8_t*>(pointers[10]);
  p.tile_of = static_cast<const int32_t*>(pointers[11]);
  p.tiles = static_cast<const uint8_t*>(pointers[12]);
  p.row_scale = static_cast<const float*>(pointers[13]);
  p.addend = pointers[14];
  p.q_order = static_cast<const int32_t*>(pointers[15]);
  p.k_order = static_cast<const int32_t*>(pointers[16]);
  void* out = const_cast<void*>(pointers[3]);
  float* lse = static_cast<float*>(const_cast<void*>(pointers[4]));
  if (dtype == 0) {
    run<float, float>(p, pointers[0], pointers[1], pointers[2], out, lse);
  } else if (dtype == 1) {
    run<at::BFloat16, std::conditional_t<EFF_DOT_BF16, at::BFloat16, float>>(p, pointers[0], pointers[1], pointers[2], out, lse);
  } else {
    run<at::Half, float>(p, pointers[0], pointers[1], pointers[2], out, lse);
  }
}
