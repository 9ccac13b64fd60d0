// out = dropout(conv3x3(relu(bn(x))) + bias): each line of x is normalised once by a task into a ring of lines that
// fits the cache, and multiplied from there; the normalised tensor never exists in memory. The output's statistics are
// taken from the lines just written, as stored.
#pragma once

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
  const Affine<A> affine;
  Operand *packed, *rings, *staging;
  A* bias;
  const TaskMoments moments;
  const DropFactors<A> drop;

  int64_t bias_size() const { return padded<A>(p.N) + L; }  // blocks of lanes read it from any column on
  int64_t packed_size() const {
    return lanes.R ? LanesConv<P>::packed_size(p.C, p.N, image, lanes.R) : LineConv<P>::packed_size(p.C, p.N, image);
  }
  int64_t staging_size() const { return lanes.R ? LanesConv<P>::staging_size(image.width, pitch) : 0; }

 public:
  Conv3x3Forward(const BnReluConv3x3<T>& p, const Pool& pool)
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
        scratch(Affine<A>::bytes(norm_size) + Scratch::bytes<Operand>(packed_size()) + Scratch::bytes<A>(bias_size()) +
                Scratch::bytes<Operand>(ring.zeros_size()) + Scratch::bytes<Operand>(pool.tasks * ring.size()) +
                Scratch::bytes<Operand>(pool.tasks * staging_size()) + TaskMoments::bytes(pool.tasks, p.N)),
        affine(scratch, p.norm, norm_size),
        packed(scratch.take<Operand>(packed_size())),
        rings(scratch.take<Operand>(pool.tasks * ring.size())),
        staging(scratch.take<Operand>(pool.tasks * staging_size())),
        bias(scratch.take<A>(bias_size())),
        moments(scratch, pool.tasks, p.N),
        drop(p.drop_rate, p.seed, p.layer, p.drop_rows) {
    ring.zeros = scratch.take<Operand>(ring.zeros_size());
    std::fill_n(ring.zeros, ring.zeros_size(), Operand{});
    std::fill_n(bias, bias_size(), A(0));
    if (p.bias) std::copy_n(p.bias, p.N, bias);
  }

  void run() {
    pack_taps<P>(p.weight, p.C, p.N, image.rows * 3, false, packed, pool, lanes.R);
    pool.run([&](int task) { run_task(task); });
    if (p.out_mean) moments.finish(p.N, p.out_mean, p.out_var);
  }

 private:
  void run_task(int task) const {
    LineRing<P> own = ring;
    own.data = rings + task * ring.size();
    Operand* own_staging = staging + task * staging_size();
    std::fill_n(own.data, own.size(), Operand{});
    std::fill_n(own_staging, staging_size(), Operand{});
    MomentsSum sum = moments[task];
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
      ReadAhead next_x(p.x, std::min(filled, image.count - 1) * image.width, next, p.C, conv.tiles(band, lines));
      const auto ahead = [&] { next_x.step(); };
      const auto make = [&](int64_t n, auto vectors) {
        return [&, n](const A* sums, int64_t distance, int64_t at, int64_t w, int64_t pixels) {
          write<decltype(vectors)::value>(n, sums, distance, at * image.width + band.begin + w, pixels);
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

  // The outputs of some pixels from row m on, NV vectors of columns from n on: the vectors of a pixel's sums lie
  // `distance` apart.
  template <int NV>
  DX_INLINE void write(int64_t n, const A* sums, int64_t distance, int64_t m, int64_t pixels) const {
    for (int64_t r = 0; r < pixels; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const int64_t c = n + j * L, left = p.N - c;
        Vec<A> v = load_vec(sums + j * distance + r * L) + load_vec(bias + c);
        if (drop) v *= drop.at(m + r, c);
        T* out = p.out.row(m + r) + c;
        if (left >= L)
          store(out, v);
        else
          store_part(out, v, int(left));
      }
  }
};

template <class T, class P = Product<T>>
void bn_relu_conv3x3(const BnReluConv3x3<T>& p, const Pool& pool) {
  Conv3x3Forward<T, P>(p, pool).run();
}
