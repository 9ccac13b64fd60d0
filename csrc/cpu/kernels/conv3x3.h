// out = dropout(conv3x3(relu(bn(x))) + bias): each line of x is normalised once by a task into a ring of lines that
// fits the cache, and multiplied from there; the normalised tensor never exists in memory. The output's statistics are
// taken from the lines just written, as stored.
#pragma once

template <class T>
void bn_relu_conv3x3(const BnReluConv3x3<T>& p, const Pool& pool) {
  using P = Product<T>;
  using A = Acc<T>;
  using Operand = typename P::Operand;
  constexpr int L = kLanes<A>;
  const ImageLines image(p.images, p.window);
  const int64_t pitch = LineConv<P>::pitch(p.C), Np = padded<A>(p.N), norm_size = p.norm.mean ? p.C : 0;
  const Stripes stripes(image, pitch * int64_t(sizeof(Operand)), pool.tasks);
  LineRing<P> ring = {nullptr, nullptr, stripes.lines + 2 * image.reach, LineRing<P>::positions_of(stripes.width),
                      pitch};
  const int64_t packed_size = LineConv<P>::packed_size(p.C, p.N, image);
  Scratch scratch(Affine<A>::bytes(norm_size) + Scratch::bytes<Operand>(packed_size) + Scratch::bytes<A>(Np) +
                  Scratch::bytes<Operand>(ring.zeros_size()) + Scratch::bytes<Operand>(pool.tasks * ring.size()) +
                  TaskMoments::bytes(pool.tasks, p.N));
  const Affine<A> affine(scratch, p.norm, norm_size);
  Operand* packed = scratch.take<Operand>(packed_size);
  A* bias = scratch.take<A>(Np);
  std::fill_n(bias, Np, A(0));
  if (p.bias) std::copy_n(p.bias, p.N, bias);
  ring.zeros = scratch.take<Operand>(ring.zeros_size());
  std::fill_n(ring.zeros, ring.zeros_size(), Operand{});
  Operand* rings = scratch.take<Operand>(pool.tasks * ring.size());
  const TaskMoments moments(scratch, pool.tasks, p.N);
  const DropFactors<A> drop(p.drop_rate, p.seed, p.layer, p.drop_rows);
  const LineConv<P> conv = {image, packed, p.C, p.N};
  pack_taps<P>(p.weight, p.C, p.N, conv.taps(), false, packed, pool);

  pool.run([&](int task) {
    LineRing<P> own = ring;
    own.data = rings + task * ring.size();
    std::fill_n(own.data, own.size(), Operand{});
    MomentsSum sum = moments[task];
    int64_t filled = 0;  // the line up to which the ring is
    stripes.for_task(image, pool.tasks, task, [&](Stripes::Band band, int64_t line, int64_t lines, bool starts) {
      if (starts) filled = std::max(line - image.reach, image.image_begin(line));
      for (const int64_t end = std::min(line + lines + image.reach, image.image_end(line + lines - 1)); filled < end;
           ++filled) {
        const Rows<const T> x = {p.x.row(filled * image.width), p.x.pitch};
        Operand* to = own.line(filled);
        const AlongColumns<P> target = {to + pitch, pitch};
        if (p.norm.mean)
          fill_band<P>(band, image.width, p.C, NormalisedRows<T>{x, affine}, target, to, pitch);
        else
          fill_band<P>(band, image.width, p.C, GivenPixels<T>{x}, target, to, pitch);
      }
      // The lines of the next stripe, where those lie behind each other in memory.
      const int64_t next = stripes.bands == 1 ? std::min(lines, image.count - filled) * image.width : 0;
      ReadAhead next_x(p.x, std::min(filled, image.count - 1) * image.width, next, p.C, conv.tiles(band, lines));
      conv.run(
          own, band, line, lines, [&] { next_x.step(); },
          [&](int64_t n, auto vectors) {
            return [&, n](const A* sums, int64_t vector_distance, int64_t at, int64_t w, int64_t pixels) {
              const int64_t m = at * image.width + band.begin + w;
              for (int64_t r = 0; r < pixels; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < decltype(vectors)::value; ++j) {
                  const int64_t c = n + j * L, left = p.N - c;
                  Vec<A> v = load_vec(sums + j * vector_distance + r * L) + load_vec(bias + c);
                  if (drop) v *= drop.at(m + r, c);
                  T* out = p.out.row(m + r) + c;
                  if (left >= L)
                    store(out, v);
                  else
                    store_part(out, v, int(left));
                }
            };
          });
      if (!p.out_mean) return;
      if (stripes.bands == 1) {
        sum.add_panel(p.out.row(line * image.width), p.out.pitch, lines * image.width, p.N);
      } else {
        for (int64_t l = line; l < line + lines; ++l)
          sum.add_panel(p.out.row(l * image.width + band.begin), p.out.pitch, band.width, p.N);
      }
    });
  });
  if (p.out_mean) moments.finish(p.N, p.out_mean, p.out_var);
}
