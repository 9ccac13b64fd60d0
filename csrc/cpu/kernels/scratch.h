// Working memory of one call, taken before its threads start (an allocation that fails is then an ordinary exception),
// and the two vectors that every kernel derives from a Norm.
#pragma once

// One aligned allocation, dealt out in pieces. Sizes are counted first by a dry run of the same code.
class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : begin_(bytes ? static_cast<char*>(::operator new(bytes, std::align_val_t(64))) : nullptr), next_(begin_) {}
  ~Scratch() { ::operator delete(begin_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class A>
  static size_t bytes(int64_t count) {
    return (size_t(count) * sizeof(A) + 63) / 64 * 64;
  }
  template <class A>
  A* take(int64_t count) {
    char* p = next_;
    next_ += bytes<A>(count);
    return reinterpret_cast<A*>(p);
  }

 private:
  char *begin_, *next_;
};

// An array of each task.
template <class A>
struct Each {
  char* first;
  size_t distance;
  DX_INLINE A* operator[](int task) const { return reinterpret_cast<A*>(first + size_t(task) * distance); }
};

// What tasks write for themselves, dealt out like Scratch. See task_memory.h.
class TaskScratch {
 public:
  TaskScratch(int tasks, size_t bytes) : memory_(tasks, bytes) {}
  template <class A>
  Each<A> take(int64_t count) {
    const Each<A> taken = {memory_.of_task(0) + used_, memory_.distance()};
    used_ += Scratch::bytes<A>(count);
    return taken;
  }

 private:
  TaskMemory memory_;
  size_t used_ = 0;
};

// The packed weights of a call: kept ones; or each task's own, as what another core has written takes longer to come
// than to pack; or, where those would be too large, the call's, which its tasks share.
template <class Operand>
class CallWeights {
 public:
  static size_t bytes(const PackedWeights* kept, int64_t count) { return kept || own(count) ? 0 : size(count); }
  static size_t task_bytes(const PackedWeights* kept, int64_t count) { return kept || !own(count) ? 0 : size(count); }
  CallWeights(Scratch& scratch, TaskScratch& task_scratch, PackedWeights* kept, const PackedForm& form, int64_t count)
      : memory_(kept, form, size(count)),
        own_(task_scratch.take<Operand>(kept || !own(count) ? 0 : count)),
        shared_(kept         ? static_cast<Operand*>(memory_.data())
                : own(count) ? nullptr
                             : scratch.take<Operand>(count)) {}

  // Has pack(to, task, tasks) write each task's share of what tasks share, unless that is there.
  template <class Pack>
  void write(const Pool& pool, const Pack& pack) {
    if (!shared_ || memory_.ready()) return;
    pool.run([&](int task) { pack(shared_, task, pool.tasks); });
    memory_.keep();
  }
  // A task's weights. Has pack(to) write those that are its own.
  template <class Pack>
  const Operand* of_task(int task, const Pack& pack) const {
    if (shared_) return shared_;
    pack(own_[task]);
    return own_[task];
  }

 private:
  static size_t size(int64_t count) { return Scratch::bytes<Operand>(count); }
  static bool own(int64_t count) { return size(count) <= size_t(2) << 20; }

  PackedMemory memory_;
  Each<Operand> own_;
  Operand* shared_;
};

// Columns rounded up to whole vectors: per-channel scratch can then be read and written without looking at the edge.
template <class A>
inline int64_t padded(int64_t C) {
  return (C + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// BatchNorm as every kernel computes it, (x - mean) * scale + bias: exact where a channel is constant, at any mean, and
// the same bits in all kernels, so that the backward pass masks what the forward pass has cut. (x * scale + shift, with
// shift = bias - mean * scale, saves a subtraction and leaves the rounding of a large shift.)
template <class A>
struct Affine {
  static constexpr int L = kLanes<A>;
  A* vectors;  // mean, scale and bias of a vector of columns, one after the other, then of the next; zero beyond C
  A* rstd;     // [padded C]; zero beyond C

  static int64_t size(int64_t C) { return 4 * padded<A>(C); }
  static size_t bytes(int64_t C) { return Scratch::bytes<A>(size(C)); }
  Affine(Scratch& scratch, const Norm<A>& norm, int64_t C) : Affine(scratch.take<A>(size(C)), norm, C) {}
  // In a task's own memory: as long as another core takes to fetch the vectors from the one that wrote them, each takes
  // to compute them.
  Affine(A* memory, const Norm<A>& norm, int64_t C) {
    const int64_t Cp = padded<A>(C);
    vectors = memory, rstd = memory + 3 * Cp;
    for_columns<A>(C, [&](int64_t c, auto columns) {
      Vec<A> mean = {}, r = broadcast(A(1)), scale = r, bias = {};  // where x is normalised already
      if (norm.mean) {
        // as bn_rstd
        r = broadcast(A(1)) / square_root<A>(columns.load(norm.var + c) + broadcast(A(norm.eps)));
        scale = norm.weight ? columns.load(norm.weight + c) * r : r;
        if (norm.bias) bias = columns.load(norm.bias + c);
        mean = columns.load(norm.mean + c);
      }
      A* const own = vectors + 3 * c;
      store_vec(own, mean), store_vec(own + L, scale), store_vec(own + 2 * L, bias), store_vec(rstd + c, r);
    });
    for (int64_t c = C; c < Cp; ++c) {
      rstd[c] = A(0);
      for (int i = 0; i < 3; ++i) vectors[3 * (Cp - L) + i * L + c % L] = A(0);
    }
  }
  // c: a vector's first column.
  Affine from(int64_t c) const {
    Affine rest = *this;
    rest.vectors += 3 * c, rest.rstd += c;
    return rest;
  }
  A scale(int64_t c) const { return vectors[3 * (c - c % L) + L + c % L]; }
  // Of a vector of columns, in registers for the rows that follow.
  struct Columns {
    Vec<A> mean, scale, bias;
    DX_INLINE explicit Columns(const A* own)
        : mean(load_vec(own)), scale(load_vec(own + L)), bias(load_vec(own + 2 * L)) {}
    Columns() = default;
    DX_INLINE Vec<A> of_centered(Vec<A> xc) const { return xc * scale + bias; }
    DX_INLINE Vec<A> operator()(Vec<A> x) const { return of_centered(x - mean); }
  };
  DX_INLINE Columns at(int64_t c) const { return Columns(vectors + 3 * c); }
};

// A per-channel input that may be shorter than its last vector, copied with zeros behind it.
template <class A>
inline A* padded_copy(Scratch& scratch, const A* values, int64_t C) {
  const int64_t Cp = padded<A>(C);
  A* copy = scratch.take<A>(Cp);
  for (int64_t c = 0; c < C; ++c) copy[c] = values[c];
  for (int64_t c = C; c < Cp; ++c) copy[c] = A(0);
  return copy;
}
