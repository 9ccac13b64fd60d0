// The backward pass of out = dropout(conv3x3(relu(bn(x))) + bias) in one pass over x and the gradient, stripe by
// stripe:
//   g   = dropout'(grad + the statistics' share)            as in feature_grad
//   y   = relu(bn(x))                                       recomputed
//   dW += g^T @ y, shifted for each position of the window  one sum per task
//   da  = g convolved with the window turned round          never stored where x's gradient is asked
//   dy  = da where bn(x) > 0,  sum(dy),  sum(dy (x - m)),  G = s dy + (G | grad_in | 0)
// Lines of g and y lie in rings, as each is needed for its neighbours too.
#pragma once

template <class T>
struct CompletedGrad {
  using A = Acc<T>;
  Rows<const T> grad, features;
  const A *mean, *offset, *slope;  // [padded N]
  DropFactors<A> drop;
  int64_t first;  // the row of all rows at which these begin
  struct Columns {
    Vec<A> mean, offset, slope;
  };
  DX_INLINE Columns at(int64_t c) const {
    if (!features) return {Vec<A>{}, Vec<A>{}, Vec<A>{}};
    return {load_vec(mean + c), load_vec(offset + c), load_vec(slope + c)};
  }
  template <class C>
  DX_INLINE Vec<A> value(const Columns& at, int64_t row, int64_t c, C columns) const {
    Vec<A> g = columns.load(grad.row(row) + c);
    if (features) g += at.offset + times_or_zero<A>(at.slope, columns.load(features.row(row) + c) - at.mean);
    if (drop) g *= drop.at(first + row, c);
    return g;
  }
};

// g twice, where pairs are multiplied: along its columns for dgrad, along its pixels for wgrad.
template <class P>
struct GradLine {
  AlongColumns<P> of_dgrad;
  AlongRows<P> of_wgrad;
  DX_INLINE void put(int64_t row, int64_t c, const Vec<typename P::A> (&v)[kRowGroup]) const {
    of_dgrad.put(row, c, v);
    if (P::kDepth > 1) of_wgrad.put(row, c, v);
  }
};

// What follows the products of dgrad for one vector of columns. Pointers are members of their own, as in DgradColumns.
template <class T>
struct InputGradColumns {
  using A = Acc<T>;
  const T *x, *in;  // x null: no sums, no mask; in: what grad_x is added to, or null
  T* out;           // or null
  int64_t x_pitch, in_pitch, out_pitch;
  int width;  // columns of this vector that exist
  bool scaled;
  typename Affine<A>::Columns norm;
  Vec<A> sum, sum_xc;

  InputGradColumns() = default;
  InputGradColumns(const BnReluConv3x3Backward<T>& p, const Affine<A>& affine, bool reads_x, int64_t c)
      : x(reads_x ? p.x.data + c : nullptr),
        in(!p.scaled      ? nullptr
           : p.grad_in    ? p.grad_in.data + c
           : p.accumulate ? p.grad_x.data + c
                          : nullptr),
        out(p.grad_x ? p.grad_x.data + c : nullptr),
        x_pitch(p.x.pitch),
        in_pitch(p.grad_in ? p.grad_in.pitch : p.grad_x.pitch),
        out_pitch(p.grad_x.pitch),
        width(int(std::min<int64_t>(kLanes<A>, p.C - c))),
        scaled(p.scaled),
        sum{},
        sum_xc{} {
    if (x) norm = affine.at(c);
  }

  DX_INLINE void add(const A* da, int64_t m, int64_t pixels) {
    if (width == kLanes<A>)
      add(da, m, pixels, Whole{});
    else
      add(da, m, pixels, Part{width});
  }

 private:
  template <class Columns>
  DX_INLINE void add(const A* da, int64_t m, int64_t pixels, Columns columns) {
    Vec<A> s = sum, s_xc = sum_xc;
    for (int64_t r = m; r < m + pixels; ++r, da += kLanes<A>) {
      Vec<A> g = load_vec(da);
      if (x) {
        const Vec<A> xc = columns.load(x + r * x_pitch) - norm.mean;
        const Vec<A> dy = relu_mask<A>(norm.of_centered(xc), g);
        s += dy;
        s_xc += dy * xc;
        if (scaled) g = dy * norm.scale;
      }
      if (in) g += columns.load(in + r * in_pitch);
      if (out) columns.store(out + r * out_pitch, g);
    }
    sum = s;
    sum_xc = s_xc;
  }
};

// What the convolution's backward pass has beside the products: what they are made from, and the sums that they leave.
template <class T>
struct Conv3x3Gradients {
  using A = Acc<T>;
  const BnReluConv3x3Backward<T>& p;
  const bool want_wgrad, want_dgrad, reads_x;  // reads_x: behind dgrad
  const Affine<A> affine;
  CompletedGrad<T> grad;
  const TaskSums sums, bias_sums;

  static int64_t norm_size(const BnReluConv3x3Backward<T>& p) { return p.norm.mean ? p.C : 0; }
  static size_t bytes(const BnReluConv3x3Backward<T>& p, int tasks) {
    return Affine<A>::bytes(norm_size(p)) + 3 * Scratch::bytes<A>(padded<A>(p.N)) + TaskSums::bytes(tasks, p.C) +
           TaskSums::bytes(tasks, p.N);
  }
  Conv3x3Gradients(Scratch& scratch, const BnReluConv3x3Backward<T>& p, int tasks)
      : p(p),
        want_wgrad(p.grad_conv_weight),
        want_dgrad(p.grad_x || p.grad_weight || p.grad_mean),
        reads_x(p.scaled || p.grad_weight || p.grad_mean),
        affine(scratch, p.norm, norm_size(p)),
        grad(completed_grad(scratch)),
        sums(scratch, tasks, p.C),
        bias_sums(scratch, tasks, p.N) {}

  // What follows dgrad's products for a vector of columns, and where its sums go.
  InputGradColumns<T> columns(int64_t c) const { return InputGradColumns<T>(p, affine, reads_x, c); }
  void add(int task, int64_t c, const InputGradColumns<T>& columns) const {
    sums.add<A>(task, c, columns.sum, columns.sum_xc);
  }

  void finish() const {
    if (p.grad_weight) sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
    if (p.grad_mean)
      for (int64_t c = 0; c < p.C; ++c) {
        const auto d = bn_statistics_grad<A>(affine.scale(c), affine.rstd[c], A(sums.dy(c)), A(sums.dy_xc(c)));
        p.grad_mean[c] += d.mean;
        p.grad_var[c] += d.var;
      }
    if (p.grad_conv_bias)
      for (int64_t n = 0; n < p.N; ++n) p.grad_conv_bias[n] = A(bias_sums.dy(n));
  }

 private:
  CompletedGrad<T> completed_grad(Scratch& scratch) const {
    const int64_t Np = padded<A>(p.N);
    A *mean = scratch.take<A>(Np), *offset = scratch.take<A>(Np), *slope = scratch.take<A>(Np);
    std::fill_n(mean, Np, A(0));
    std::fill_n(offset, Np, A(0));
    std::fill_n(slope, Np, A(0));
    const A M = A(p.images.rows());
    for (int64_t n = 0; p.features && n < p.N; ++n) {
      mean[n] = p.features_mean[n];
      offset[n] = p.features_grad_mean[n] / M;
      slope[n] = A(2) * p.features_grad_var[n] / M;
    }
    return {p.grad, p.features, mean, offset, slope, DropFactors<A>(p.drop_rate, p.seed, p.layer, p.drop_rows), 0};
  }
};

template <class T, class P>
class Conv3x3Backward {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  static constexpr int L = kLanes<A>;
  static constexpr bool kPairs = P::kDepth > 1;

  const BnReluConv3x3Backward<T>& p;
  const Pool& pool;
  const ImageLines image;
  const bool want_wgrad, want_dgrad;
  const int64_t y_pitch, g_rows_pitch;
  const Stripes stripes;
  LineRing<P> g, y;
  const TaskWgrad<P> wgrad;
  const int64_t g_rows_line, g_rows_size;  // g along its pixels
  Scratch scratch;
  TaskScratch task_scratch;
  const Conv3x3Gradients<T> all;
  const TapsPacking<P> packing;
  CallWeights<Operand> weights;
  const Each<Operand> operands;
  const Each<A> wgrads;

  int64_t packed_size() const { return want_dgrad ? LineConv<P>::packed_size(p.N, p.C, image) : 0; }
  // A task's y, g along its columns, g along its pixels: each at the start of a cache line.
  static int64_t whole(int64_t operands) { return int64_t(Scratch::bytes<Operand>(operands) / sizeof(Operand)); }
  int64_t y_size() const { return want_wgrad ? whole(y.size()) : 0; }
  int64_t task_operands() const { return y_size() + whole(g.size()) + whole(g_rows_size); }
  int64_t wgrad_size() const { return want_wgrad ? wgrad.size() : 0; }

  static LineRing<P> ring(const ImageLines& image, const Stripes& stripes, int64_t pitch) {
    return {nullptr, nullptr, stripes.lines + 2 * image.reach, LineRing<P>::positions_of(stripes.width), pitch};
  }

 public:
  Conv3x3Backward(const BnReluConv3x3Backward<T>& p, const Pool& pool)
      : p(p),
        pool(pool),
        image(p.images, p.window),
        want_wgrad(p.grad_conv_weight),
        want_dgrad(p.grad_x || p.grad_weight || p.grad_mean),
        y_pitch(padded<A>(p.C)),
        g_rows_pitch(padded<A>(p.N)),
        stripes(image, (y_pitch + LineConv<P>::pitch(p.N)) * int64_t(sizeof(Operand)), pool.tasks),
        g(ring(image, stripes, LineConv<P>::pitch(p.N))),
        y(ring(image, stripes, y_pitch)),
        wgrad{p.N, p.C, image.rows * 3},
        g_rows_line(kPairs ? (g.positions - 2) / P::kDepth * g_rows_pitch : 0),
        // Tiles read some columns beyond the last row.
        g_rows_size(kPairs ? g.slots * g_rows_line + kLongRows : 0),
        scratch(Conv3x3Gradients<T>::bytes(p, pool.tasks) + Scratch::bytes<Operand>(g.zeros_size()) +
                CallWeights<Operand>::bytes(nullptr, packed_size())),
        task_scratch(pool.tasks, Scratch::bytes<Operand>(task_operands()) + Scratch::bytes<A>(wgrad_size()) +
                                     CallWeights<Operand>::task_bytes(nullptr, packed_size())),
        all(scratch, p, pool.tasks),
        packing(TapsPacking<P>::backwards({p.weight.data, p.weight.input, p.weight.output, p.weight.tap}, p.N, p.C,
                                          wgrad.taps)),
        weights(scratch, task_scratch, nullptr, {}, packed_size()),
        operands(task_scratch.take<Operand>(task_operands())),
        wgrads(task_scratch.take<A>(wgrad_size())) {
    g.zeros = scratch.take<Operand>(g.zeros_size());
    std::fill_n(g.zeros, g.zeros_size(), Operand{});
  }

  void run() {
    if (want_dgrad) weights.write(pool, [&](Operand* to, int task, int tasks) { packing.share(to, task, tasks); });
    pool.run([&](int task) { run_task(task); });
    all.finish();
    if (want_wgrad) wgrad.finish(wgrads, pool.tasks, p.grad_conv_weight, pool);
  }

 private:
  void run_task(int task) {
    Operand* own = operands[task];
    A* own_wgrad = wgrads[task];
    std::fill_n(own, task_operands(), Operand{});  // columns beyond the last one stay zero
    std::fill_n(own_wgrad, wgrad_size(), A(0));
    LineRing<P> own_g = g, own_y = y;
    own_y.data = own;
    own_g.data = own + y_size();
    Operand* g_rows = own_g.data + whole(g.size());
    const Operand* packed = nullptr;
    if (want_dgrad) packed = weights.of_task(task, [&](Operand* to) { packing.share(to, 0, 1); });
    const LineConv<P> conv = {image, packed, p.N, p.C};
    int64_t filled = 0;  // the line up to which the rings are
    stripes.for_task(image, pool.tasks, task, [&](Stripes::Band band, int64_t line, int64_t lines, bool starts) {
      if (starts) filled = std::max(line - image.reach, image.image_begin(line));
      for (const int64_t end = std::min(line + lines + image.reach, image.image_end(line + lines - 1)); filled < end;
           ++filled) {
        fill_grad(band, filled, own_g.line(filled), g_rows + filled % g.slots * g_rows_line);
        if (!want_wgrad) continue;
        const Rows<const T> x = {p.x.row(filled * image.width), p.x.pitch};
        if (p.norm.mean)
          fill_input(band, NormalisedRows<T>{x, all.affine}, own_y.line(filled));
        else
          fill_input(band, GivenPixels<T>{x}, own_y.line(filled));
      }
      if (p.grad_conv_bias) add_bias(task, band, line, lines, own_g);
      if (want_wgrad) add_wgrad(band, line, lines, own_g, g_rows, own_y, own_wgrad);
      if (!want_dgrad) return;
      // The lines of the next stripe, where those lie behind each other in memory.
      const int64_t next = stripes.bands == 1 ? std::min(lines, image.count - filled) * image.width : 0;
      const int64_t first = std::min(filled, image.count - 1) * image.width;
      // What is added to comes from memory too, for the next stripe's outputs.
      const bool adds = p.scaled && (p.grad_in || p.accumulate) && stripes.bands == 1;
      const Rows<const T> in = !adds ? p.x : p.grad_in ? p.grad_in : Rows<const T>{p.grad_x.data, p.grad_x.pitch};
      const int64_t behind = std::min(lines, image.count - line - lines) * image.width;
      ReadsAhead ahead(ReadAhead(in, std::min(line + lines, image.count - 1) * image.width, adds ? behind : 0, p.C),
                       ReadAhead(p.x, first, want_wgrad || all.reads_x ? next : 0, p.C),
                       ReadAhead(p.features ? p.features : p.grad, first, p.features ? next : 0, p.N),
                       ReadAhead(p.grad, first, next, p.N));
      conv.run(own_g, band, line, lines, ahead,
               [&](int64_t c, auto vectors) { return Columns<decltype(vectors)::value>(*this, task, band, c); });
    });
  }

  void fill_grad(Stripes::Band band, int64_t line, Operand* to, Operand* rows) const {
    CompletedGrad<T> from = all.grad;
    from.first = line * image.width;
    from.grad.data = p.grad.row(from.first);
    if (p.features) from.features.data = p.features.row(from.first);
    const GradLine<P> target = {{to + g.pitch, g.pitch}, {rows, g_rows_pitch}};
    fill_band<P>(band, image.width, p.N, from, target, to, g.pitch);
  }
  template <class Source>
  void fill_input(Stripes::Band band, const Source& source, Operand* to) const {
    if constexpr (kPairs)
      fill_pairs<P>(band, image.width, p.C, source, to, y_pitch);
    else
      fill_band<P>(band, image.width, p.C, source, AlongColumns<P>{to + y_pitch, y_pitch}, to, y_pitch);
  }

  void add_bias(int task, Stripes::Band band, int64_t line, int64_t lines, const LineRing<P>& own_g) const {
    for (int64_t c = 0; c < p.N; c += L) {
      Vec<A> sum = {};
      for (int64_t l = line; l < line + lines; ++l)
        for (int64_t w = 0; w < band.width; ++w) sum += P::load_along_columns(own_g.line(l) + (w + 1) * g.pitch, c);
      all.bias_sums.template add<A>(task, c, sum, Vec<A>{});
    }
  }

  void add_wgrad(Stripes::Band band, int64_t line, int64_t lines, const LineRing<P>& own_g, const Operand* g_rows,
                 const LineRing<P>& own_y, A* own_wgrad) const {
    const Operand *of_g[Stripes::kMostLines],
        *of_y[kMostWindowRows][Stripes::kMostLines], *const *rows[kMostWindowRows];
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t l = line + i;
      of_g[i] = kPairs ? g_rows + l % g.slots * g_rows_line : own_g.line(l) + g.pitch;
      for (int row = 0; row < image.rows; ++row) {
        const int64_t from = image.neighbour(l, row);
        of_y[row][i] = from < 0 ? nullptr : own_y.line(from);
      }
    }
    for (int row = 0; row < image.rows; ++row) rows[row] = of_y[row];
    const int64_t whole = band.width / P::kDepth, steps = (band.width + P::kDepth - 1) / P::kDepth;
    wgrad.add({lines, steps, whole, of_g, kPairs ? g_rows_pitch : g.pitch, P::kDepth * y_pitch}, rows, y_pitch,
              own_wgrad);
  }

  // What LineConv gives for a block of columns.
  template <int NV>
  struct Columns {
    const Conv3x3Backward& pass;
    int task;
    Stripes::Band band;
    int64_t c;
    InputGradColumns<T> columns[NV];

    Columns(const Conv3x3Backward& pass, int task, Stripes::Band band, int64_t c)
        : pass(pass), task(task), band(band), c(c) {
      for (int j = 0; j < NV; ++j) columns[j] = pass.all.columns(c + j * L);
    }
    ~Columns() {
      for (int j = 0; j < NV; ++j) pass.all.add(task, c + j * L, columns[j]);
    }
    DX_INLINE void operator()(const A* da, int64_t vector_distance, int64_t line, int64_t w, int64_t pixels) {
      for (int j = 0; j < NV; ++j)
        columns[j].add(da + j * vector_distance, line * pass.image.width + band.begin + w, pixels);
    }
  };
};
