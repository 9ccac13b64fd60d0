// out = dropout(conv3x3(relu(bn(x))) + bias): each line of x is normalised once by a task into a ring of lines that
// fits the cache, and multiplied from there; the normalised tensor never exists in memory. The output's statistics are
// taken from the lines just written, as stored.
#pragma once

// Where the sums go: with the bias and dropout into the rows of `out`.
template <class T>
struct Conv3x3Output {
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;
  Rows<T> out;
  int64_t N;
  A* bias;  // blocks of vectors read it from any column on
  DropFactors<A> drop;

  static int64_t bias_size(int64_t N) { return padded<A>(N) + L; }
  // memory: of bias_size(N).
  Conv3x3Output(A* memory, const BnReluConv3x3<T>& p)
      : out(p.out), N(p.N), bias(memory), drop(p.drop_rate, p.seed, p.layer, p.drop_rows) {
    std::fill_n(bias, bias_size(p.N), A(0));
    if (p.bias) std::copy_n(p.bias, p.N, bias);
  }

  // The outputs of some pixels from row m on, NV vectors of columns from n on: the vectors of a pixel's sums lie
  // `distance` apart.
  template <int NV>
  DX_INLINE void write(int64_t n, const A* sums, int64_t distance, int64_t m, int64_t pixels) const {
    for (int64_t r = 0; r < pixels; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const int64_t c = n + j * L, left = N - c;
        Vec<A> v = load_vec(sums + j * distance + r * L) + load_vec(bias + c);
        if (drop) v *= drop.at(m + r, c);
        T* to = out.row(m + r) + c;
        if (left >= L)
          store(to, v);
        else
          store_part(to, v, int(left));
      }
  }
};

template <class T, class P>
class Conv3x3Forward {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  static constexpr int L = kLanes<A>;

  const BnReluConv3x3<T>& p;
  const Pool& pool;
  const ImageLines image;
  const int64_t norm_size, pitch;  // pitch: of pixels, in operands
  const Stripes stripes;
  const LanesChoice<P> lanes;
  LineRing<P> ring;
  Scratch scratch;
  TaskScratch task_scratch;
  const TapsPacking<P> packing;
  CallWeights<Operand> weights;
  const Each<Operand> rings, staging;
  const Each<A> norms, biases;
  const TaskMoments moments;

  int64_t packed_size() const {
    return lanes.R ? LanesConv<P>::packed_size(p.C, p.N, image, lanes.R) : LineConv<P>::packed_size(p.C, p.N, image);
  }
  int64_t staging_size() const { return lanes.R ? LanesConv<P>::staging_size(image.width, pitch) : 0; }

 public:
  Conv3x3Forward(const BnReluConv3x3<T>& p, const Pool& pool, PackedWeights* kept)
      : p(p),
        pool(pool),
        image(p.images, p.window),
        norm_size(p.norm.mean ? p.C : 0),
        pitch(LineConv<P>::pitch(p.C)),
        stripes(image, pitch * int64_t(sizeof(Operand)), pool.tasks),
        lanes(stripes, p.C, p.N),
        ring{nullptr, nullptr, stripes.lines + 2 * image.reach,
             lanes.R ? LanesConv<P>::positions_of(image.width) : LineRing<P>::positions_of(stripes.width),
             lanes.R ? depth_steps<P>(p.C) : pitch},
        scratch(CallWeights<Operand>::bytes(kept, packed_size()) + Scratch::bytes<Operand>(ring.zeros_size())),
        task_scratch(pool.tasks, Scratch::bytes<Operand>(ring.size()) + Scratch::bytes<Operand>(staging_size()) +
                                     CallWeights<Operand>::task_bytes(kept, packed_size()) +
                                     Affine<A>::bytes(norm_size) + Scratch::bytes<A>(Conv3x3Output<T>::bias_size(p.N)) +
                                     TaskMoments::bytes(p.N)),
        packing{p.weight, p.C, p.N, image.rows * 3, lanes.R},
        weights(scratch, task_scratch, kept, {2, sizeof(Operand), P::kDepth, L, packed_size(), lanes.R}, packed_size()),
        rings(task_scratch.take<Operand>(ring.size())),
        staging(task_scratch.take<Operand>(staging_size())),
        norms(task_scratch.take<A>(Affine<A>::size(norm_size))),
        biases(task_scratch.take<A>(Conv3x3Output<T>::bias_size(p.N))),
        moments(task_scratch, pool.tasks, p.N) {
    ring.zeros = scratch.take<Operand>(ring.zeros_size());
    std::fill_n(ring.zeros, ring.zeros_size(), Operand{});
  }

  void run() {
    weights.write(pool, [&](Operand* to, int task, int tasks) { packing.share(to, task, tasks); });
    pool.run([&](int task) { run_task(task); });
    if (p.out_mean) moments.finish(p.N, p.out_mean, p.out_var);
  }

 private:
  void run_task(int task) const {
    LineRing<P> own = ring;
    own.data = rings[task];
    Operand* own_staging = staging[task];
    std::fill_n(own.data, own.size(), Operand{});
    std::fill_n(own_staging, staging_size(), Operand{});
    MomentsSum sum = moments.begin(task);
    const Affine<A> affine(norms[task], p.norm, norm_size);
    const Conv3x3Output<T> output(biases[task], p);
    const Operand* packed = weights.of_task(task, [&](Operand* to) { packing.share(to, 0, 1); });
    const LineConv<P> conv = {image, packed, p.C, p.N};
    const LanesConv<P> lanes_conv = {image, packed, p.C, p.N, lanes.R};
    int64_t filled = 0;  // the line up to which the ring is
    stripes.for_task(image, pool.tasks, task, [&](Stripes::Band band, int64_t line, int64_t lines, bool starts) {
      if (starts) filled = std::max(line - image.reach, image.image_begin(line));
      for (const int64_t end = std::min(line + lines + image.reach, image.image_end(line + lines - 1)); filled < end;
           ++filled) {
        const Rows<const T> x = {p.x.row(filled * image.width), p.x.pitch};
        if (p.norm.mean)
          fill(band, NormalisedRows<T>{x, affine}, own_staging, own.line(filled));
        else
          fill(band, GivenPixels<T>{x}, own_staging, own.line(filled));
      }
      // The lines of the next stripe, where those lie behind each other in memory.
      const int64_t next = stripes.bands == 1 ? std::min(lines, image.count - filled) * image.width : 0;
      ReadsAhead ahead(ReadAhead(p.x, std::min(filled, image.count - 1) * image.width, next, p.C));
      const auto make = [&](int64_t n, auto vectors) {
        return [&, n](const A* sums, int64_t distance, int64_t at, int64_t w, int64_t pixels) {
          output.template write<decltype(vectors)::value>(n, sums, distance, at * image.width + band.begin + w, pixels);
        };
      };
      if (lanes.R)
        lanes_conv.run(own, line, lines, ahead, make);
      else
        conv.run(own, band, line, lines, ahead, make);
      if (!p.out_mean) return;
      if (stripes.bands == 1) {
        sum.add_panel(p.out.row(line * image.width), p.out.pitch, lines * image.width, p.N);
      } else {
        for (int64_t l = line; l < line + lines; ++l)
          sum.add_panel(p.out.row(l * image.width + band.begin), p.out.pitch, band.width, p.N);
      }
    });
  }

  template <class Source>
  void fill(Stripes::Band band, const Source& source, Operand* own_staging, Operand* to) const {
    if (!lanes.R) return fill_band<P>(band, image.width, p.C, source, AlongColumns<P>{to + pitch, pitch}, to, pitch);
    fill_rows<A>(0, image.width, round_up(image.width, kRowGroup), p.C, source, AlongColumns<P>{own_staging, pitch});
    LanesConv<P>::turn(own_staging, image.width, pitch, ring.pitch, ring.positions, to);
  }
};
