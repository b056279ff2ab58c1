// The experts of a layer on CPU. effcompile/ops/native.py compiles this once, with registers.h, moe_tiles.h and moe_rows.h before it.
//
// Slots (a token and one of its experts) are put in the order of the experts. Then two sweeps over the experts that any slot wants:
//   1. inner = gate(W1 x + b1), by (expert, some of its tokens, some of its inner rows), whichever thread is free;
//   2. y[t] += weight * (W2 inner + b2), every thread for columns of y of its own, so that no two threads write to one number.
// Tokens lie side by side in a register: a panel [depth][PANEL] of tokens is multiplied by rows of weights as the model has them, and
// what the first product leaves is a panel again, which the second one reads. Panels are of float, or of pairs of bfloat16 where the
// processor multiplies such: then what lies between the products is rounded, as torch rounds it. An expert of a few tokens multiplies row by row instead,
// and reads its weights once. Sums are in float32, of a token in the order of its experts, whatever the number of threads.

namespace {

struct Problem {
  int64_t tokens, top_k, experts, hidden, inner, threads;
  Shape first, second;
  Gate gate;
  bool weigh_input, keep;
  const int64_t* ids;
  const float* share;
};

// One expert's slots, and where its inner numbers lie: panels [inner][PANEL], or rows [inner] where there are FEW tokens at most.
struct Group {
  int64_t expert, begin, count, at;
  bool rows;
};

struct Task {
  int64_t group, begin, count, low, high;  // tokens [begin, begin + count) of the group, inner rows [low, high)
};

template <typename T, typename P>
void gather_rows(const Problem& p, const T* x, const int64_t* slots, int64_t count, P* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = slots[i];
    const T* from = x + slot / p.top_k * p.hidden;
    P* to = out + i * p.hidden;
    if constexpr (std::is_same_v<P, float>) {
      widen(from, p.hidden, to);
      if (p.weigh_input) scale(to, p.hidden, p.share[slot]);
    } else {
      if (!p.weigh_input) {
        std::copy(from, from + p.hidden, to);
      } else {
        for (int64_t k = 0; k < p.hidden; ++k) to[k] = static_cast<P>(static_cast<float>(from[k]) * p.share[slot]);
      }
    }
  }
}

template <typename P, typename T>
void first_sweep(const Problem& p, const T* x, const T* w1, const T* ups, const T* b1, const Group& group, const Task& task, const int64_t* slots,
                 float* inner, const TileRegisters& registers, Scratch& own) {
  const Weights<T> weights{w1 + group.expert * p.first.whole, b1 ? b1 + group.expert * p.first.outputs : nullptr, p.first,
                           ups ? ups + group.expert * p.first.whole : nullptr};
  if (group.rows) {
    float* rows = own.rows(task.count * p.hidden);
    gather_rows(p, x, slots + group.begin, task.count, rows);
    few_first(weights, p.gate, p.inner, rows, p.hidden, task.count, task.low, task.high, inner + group.at, own);
    return;
  }
  const int64_t panels = (task.count + PANEL - 1) / PANEL;
  P* packed = reinterpret_cast<P*>(own.rows((panels + 1) * PANEL * p.hidden));
  for (int64_t n = 0; n < panels; ++n) {
    const int64_t from = task.begin + n * PANEL, many = std::min(PANEL, task.begin + task.count - from);
    P* rows = packed + panels * PANEL * p.hidden;
    gather_rows(p, x, slots + group.begin + from, many, rows);
    turn(rows, p.hidden, many, p.hidden, packed + n * PANEL * p.hidden);
  }
  const int64_t first_panel = task.begin / PANEL;
  many_first<P>(weights, p.gate, p.inner, packed, p.hidden, task.count, task.low, task.high,
                reinterpret_cast<P*>(inner + group.at) + first_panel * PANEL * p.inner, registers, own);
}

template <typename P, typename T>
void second_sweep(const Problem& p, const T* w2, const T* b2, const Group& group, const int64_t* slots, const float* inner, float* y,
                  int64_t low, int64_t high, const TileRegisters& registers, Scratch& own) {
  const Weights<T> weights{w2 + group.expert * p.second.whole, b2 ? b2 + group.expert * p.hidden : nullptr, p.second};
  if (group.rows) {
    few_second(weights, inner + group.at, p.inner, group.count, low, high, own, [&](int64_t i, int64_t h, float value) {
      const int64_t slot = slots[group.begin + i];
      y[slot / p.top_k * p.hidden + h] += p.weigh_input ? value : value * p.share[slot];
    });
    return;
  }
  auto take = [&](int64_t i, int64_t h, const float* values, int64_t many) {
    const int64_t slot = slots[group.begin + i];
    accumulate(y + slot / p.top_k * p.hidden + h, values, many, p.weigh_input ? 1.f : p.share[slot]);
  };
  many_second<P>(weights, reinterpret_cast<const P*>(inner + group.at), p.inner, group.count, low, high, registers, own, take);
}

// P: what panels are made of.
template <typename P, typename T>
void run(const Problem& p, const T* x, const T* w1, const T* ups, const T* b1, const T* w2, const T* b2, T* out) {
  const int64_t slots = p.tokens * p.top_k;
  std::vector<int64_t> count(p.experts + 1), order(slots);
  for (int64_t s = 0; s < slots; ++s)
    if (p.ids[s] >= 0 && p.ids[s] < p.experts) ++count[p.ids[s] + 1];
  for (int64_t e = 0; e < p.experts; ++e) count[e + 1] += count[e];
  {
    std::vector<int64_t> next(count.begin(), count.end() - 1);
    for (int64_t s = 0; s < slots; ++s)
      if (p.ids[s] >= 0 && p.ids[s] < p.experts) order[next[p.ids[s]]++] = s;
  }
  std::vector<Group> groups;
  int64_t space = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t many = count[e + 1] - count[e];
    if (!many) continue;
    groups.push_back({e, count[e], many, space, many <= FEW});
    space += p.inner * (many <= FEW ? many : up(many, PANEL));
  }
  // Few groups are cut along the inner rows, so that all threads have work; many tokens of one expert are cut into chunks.
  const int64_t cuts = std::max<int64_t>(1, (6 * p.threads + static_cast<int64_t>(groups.size()) - 1) / std::max<int64_t>(1, groups.size()));
  std::vector<Task> tasks;
  for (size_t g = 0; g < groups.size(); ++g) {
    const int64_t step = groups[g].rows ? groups[g].count : CHUNK * PANEL;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(cuts, p.inner / 48));
    for (int64_t begin = 0; begin < groups[g].count; begin += step)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t low = p.inner * part / parts / 16 * 16, high = part + 1 == parts ? p.inner : p.inner * (part + 1) / parts / 16 * 16;
        if (low < high) tasks.push_back({static_cast<int64_t>(g), begin, std::min(step, groups[g].count - begin), low, high});
      }
  }
  std::unique_ptr<float[]> inner(new float[space + 2 * W]);
  constexpr bool direct = std::is_same_v<T, float>;
  std::unique_ptr<float[]> sums(direct ? nullptr : new float[p.tokens * p.hidden]);
  float* y = direct ? reinterpret_cast<float*>(out) : sums.get();
#pragma omp parallel num_threads(p.threads)
  {
    const TileRegisters registers(PAIRS<P>);
    Scratch own;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < static_cast<int64_t>(tasks.size()); ++n)
      first_sweep<P>(p, x, w1, ups, b1, groups[tasks[n].group], tasks[n], order.data(), inner.get(), registers, own);
#pragma omp for schedule(static, 1)
    for (int64_t part = 0; part < p.threads; ++part) {
      const int64_t low = p.hidden * part / p.threads / 16 * 16;
      const int64_t high = part + 1 == p.threads ? p.hidden : p.hidden * (part + 1) / p.threads / 16 * 16;
      if (low == high) continue;
      if (!p.keep)
        for (int64_t t = 0; t < p.tokens; ++t) std::fill(y + t * p.hidden + low, y + t * p.hidden + high, 0.f);
      for (const Group& group : groups) second_sweep<P>(p, w2, b2, group, order.data(), inner.get(), y, low, high, registers, own);
      if constexpr (!direct)
        for (int64_t t = 0; t < p.tokens; ++t) narrow(y + t * p.hidden + low, high - low, out + t * p.hidden + low);
    }
  }
}

template <typename T>
void start(const Problem& p, const void* const* given) {
  const T *x = static_cast<const T*>(given[0]), *w1 = static_cast<const T*>(given[3]), *b1 = static_cast<const T*>(given[4]),
          *w2 = static_cast<const T*>(given[5]), *b2 = static_cast<const T*>(given[6]), *ups = static_cast<const T*>(given[8]);
  T* out = static_cast<T*>(const_cast<void*>(given[7]));
  if constexpr (PAIRS<T>) {
    if (p.hidden % 2 == 0 && p.inner % 2 == 0) return run<T>(p, x, w1, ups, b1, w2, b2, out);
  }
  run<float>(p, x, w1, ups, b1, w2, b2, out);
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half. pointers: x, ids, share, w1, b1, w2, b2, out, ups: rows behind the gates where w1 has those alone.
// All rows are dense; strides are those of weights. keep: add to what out holds, float only.
extern "C" void eff_moe(int64_t dtype, const int64_t* sizes, const void* const* pointers, float alpha, float beta, float limit) {
  Problem p{};
  int64_t at = 0, act = 0, layout = 0, input = 0, keep = 0, turned[2] = {};
  for (int64_t* field : {&p.tokens, &p.top_k, &p.experts, &p.hidden, &p.inner, &act, &layout, &input, turned, turned + 1,
                         &p.threads, &p.first.whole, &p.first.stride, &p.second.whole, &p.second.stride, &keep})
    *field = sizes[at++];
  p.gate = {static_cast<int>(act), static_cast<int>(layout), alpha, beta, limit};
  p.weigh_input = input != 0;
  p.keep = keep != 0;
  p.first.transposed = turned[0] != 0;
  p.second.transposed = turned[1] != 0;
  p.first.depth = p.hidden;
  p.first.outputs = layout ? 2 * p.inner : p.inner;
  p.second.depth = p.inner;
  p.second.outputs = p.hidden;
  p.ids = static_cast<const int64_t*>(pointers[1]);
  p.share = static_cast<const float*>(pointers[2]);
  if (dtype == 0) {
    start<float>(p, pointers);
  } else if (dtype == 1) {
    start<at::BFloat16>(p, pointers);
  } else {
    start<at::Half>(p, pointers);
  }
}
