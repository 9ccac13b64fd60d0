// Squares of numbers transposed in registers.
#pragma once

#if DX_VECTOR_BYTES == 64
// The instructions in the form that zeroes lanes, of which there are none: GCC 12 warns of the plain ones' own headers.
DX_INLINE __m512i low_32(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi32(0xffff, a, b); }
DX_INLINE __m512i high_32(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi32(0xffff, a, b); }
DX_INLINE __m512i low_64(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi64(0xff, a, b); }
DX_INLINE __m512i high_64(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi64(0xff, a, b); }
template <int ORDER>
DX_INLINE __m512i quarters(__m512i a, __m512i b) {
  return _mm512_maskz_shuffle_i32x4(0xffff, a, b, ORDER);
}

// Rows and columns of 4 x 4 numbers exchanged within each quarter of four registers.
DX_INLINE void transpose_quarters(__m512i (&v)[4]) {
  const __m512i low01 = low_32(v[0], v[1]), high01 = high_32(v[0], v[1]);
  const __m512i low23 = low_32(v[2], v[3]), high23 = high_32(v[2], v[3]);
  v[0] = low_64(low01, low23);
  v[1] = high_64(low01, low23);
  v[2] = low_64(high01, high23);
  v[3] = high_64(high01, high23);
}

// Rows and columns of 16 x 16 numbers of 32 bits exchanged: pairs, then pairs of pairs within each quarter of a
// register, then the quarters.
DX_INLINE void transpose(__m512i (&v)[16]) {
  __m512i w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    w[i] = low_32(v[i], v[i + 1]);
    w[i + 1] = high_32(v[i], v[i + 1]);
  }
  // v[4 i + j]: of the rows 4 i .. 4 i + 3, column j of each quarter
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    v[i] = low_64(w[i], w[i + 2]);
    v[i + 1] = high_64(w[i], w[i + 2]);
    v[i + 2] = low_64(w[i + 1], w[i + 3]);
    v[i + 3] = high_64(w[i + 1], w[i + 3]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = quarters<0x44>(v[j], v[4 + j]), high01 = quarters<0xee>(v[j], v[4 + j]);
    const __m512i low23 = quarters<0x44>(v[8 + j], v[12 + j]), high23 = quarters<0xee>(v[8 + j], v[12 + j]);
    w[j] = quarters<0x88>(low01, low23);
    w[4 + j] = quarters<0xdd>(low01, low23);
    w[8 + j] = quarters<0x88>(high01, high23);
    w[12 + j] = quarters<0xdd>(high01, high23);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

// The columns of 4 * QUARTERS x 16 numbers in memory, whose rows lie `pitch` apart; zeros behind them. Quarters of rows
// are put together as they are loaded, which leaves half of the shuffles: Intel's cores have one unit for these.
template <int QUARTERS>
DX_INLINE void load_columns(const float* rows, int64_t pitch, __m512i (&v)[16]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i w[4];  // w[i]: of the rows i, i + 4, i + 8 and i + 12, what lies in the columns 4 j .. 4 j + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int q = 0; q < QUARTERS; ++q) {
        const float* from = rows + (4 * q + i) * pitch + 4 * j;
        const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        w[i] = _mm512_mask_broadcast_i32x4(w[i], __mmask16(0xf << 4 * q), quarter);
      }
    }
    transpose_quarters(w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[4 * j + i] = w[i];
  }
}
#endif
