// One vector of floats, as wide as the instruction set this file is compiled for.
//
// Every kernel is written once over `vf` and compiled once per instruction set, in a namespace of its own
// (PENSTOCK_ISA), so that no inline function of one can be linked into another. Nothing here may include a standard
// header with inline code beyond these, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(PENSTOCK_AVX2) || defined(PENSTOCK_AVX512)
#include <immintrin.h>
#endif

namespace penstock::PENSTOCK_ISA {

#if defined(PENSTOCK_AVX512)
constexpr int W = 16;
constexpr int NUM_REGISTERS = 32;
#elif defined(PENSTOCK_AVX2)
constexpr int W = 8;
constexpr int NUM_REGISTERS = 16;
#else
constexpr int W = 4;
constexpr int NUM_REGISTERS = 16;
#endif

// Only the instructions named below are out of a compiler's reach. Where it may not use them, because the wide sets are
// built to be tested on a machine without them (PENSTOCK_EMULATE), what stands in gives the same bits.
#if defined(PENSTOCK_AVX512) && defined(__AVX512F__)
#define PENSTOCK_512_BITS
#elif defined(PENSTOCK_AVX2)
#define PENSTOCK_256_BITS
#endif

// Whether there is an instruction for pairs of bfloat16: what meets bfloat16 weights, or a bfloat16 cache, is rounded to it then,
// and weights lie in pairs of inputs.
#if defined(PENSTOCK_BF16)
constexpr bool kBF16Pairs = true;
#else
constexpr bool kBF16Pairs = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef int16_t vs __attribute__((vector_size(W * 4)));
typedef uint8_t vbytes __attribute__((vector_size(W * 4)));

struct bf16 {
    uint16_t bits;
};

static inline vf load(const float* from) {
    vf v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float* to, vf v) { __builtin_memcpy(to, &v, sizeof v); }

static inline vi load_bits(const void* from) {
    vi v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

static inline vi word_at(const void* from) {
    int32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return vi{} + word;
}

static inline vf as_floats(vi v) { return (vf)v; }

// x - 0 is x for every x, so compilers turn this into a broadcast; 0 + x is not.
static inline vf splat(float x) { return x - vf{}; }

static inline vf fma(vf a, vf b, vf c) {
#if defined(PENSTOCK_512_BITS)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PENSTOCK_256_BITS)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(PENSTOCK_AVX512)
    for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vi max(vi a, vi b) { return a > b ? a : b; }

// Lane i + BY, and beyond the last from the first on, in lane i.
template <int BY>
static inline vf rotated(vf v) {
    vi from;
    for (int i = 0; i < W; ++i) from[i] = (i + BY) % W;
#if defined(PENSTOCK_512_BITS)
    // GCC 12 warns about what the same without a mask is made of.
    return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)from, (__m512)v);
#elif defined(PENSTOCK_256_BITS) && !defined(PENSTOCK_AVX512)
    return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
    vf result;
    for (int i = 0; i < W; ++i) result[i] = v[from[i]];
    return result;
#endif
}

// Sums and maxima across a vector go by halves, so that they round alike wherever they are taken.
template <int HALF = W / 2>
static inline float sum(vf v) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return sum<HALF / 2>(v + rotated<HALF>(v));
}

template <int HALF = W / 2>
static inline float highest(vf v) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return highest<HALF / 2>(max(v, rotated<HALF>(v)));
}

template <int HALF = W / 2>
static inline int32_t sum(vi v) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return sum<HALF / 2>(v + (vi)rotated<HALF>((vf)v));
}

template <int HALF = W / 2>
static inline int32_t highest(vi v) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return highest<HALF / 2>(max(v, (vi)rotated<HALF>((vf)v)));
}

// Compilers make several instructions of a widening conversion where there is one.
static inline vf load(const bf16* from) {
#if defined(PENSTOCK_512_BITS)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(PENSTOCK_256_BITS)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    typedef uint16_t halves __attribute__((vector_size(W * 2)));
    halves v;
    __builtin_memcpy(&v, from, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
#endif
}

static inline vf load(const int8_t* from) {
#if defined(PENSTOCK_512_BITS)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(PENSTOCK_256_BITS)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    vi v;
    for (int i = 0; i < W; ++i) v[i] = from[i];
    return __builtin_convertvector(v, vf);
#endif
}

// One byte of each word, of which byte 0 is the lowest, as the word's upper one above zeros.
static inline vi upper_byte(vi words, int byte) {
#if defined(PENSTOCK_512_BITS) || defined(PENSTOCK_256_BITS)
    if (byte == 1 || byte == 2) {  // otherwise one instruction is enough anyway
        vi which;
        for (int i = 0; i < W; ++i) which[i] = (i % 4 * 4 + byte) << 24 | 0x00808080;
#if defined(PENSTOCK_512_BITS)
        return (vi)_mm512_shuffle_epi8((__m512i)words, (__m512i)which);
#else
        return (vi)_mm256_shuffle_epi8((__m256i)words, (__m256i)which);
#endif
    }
#endif
    return (words << (24 - 8 * byte)) & (int32_t)0xff000000u;
}

// Sums of two neighbouring products of unsigned bytes with signed ones, in 16 bits, which hold no more than 32767.
static inline vs dot2_bytes(vi codes, vi activations) {
#if defined(PENSTOCK_512_BITS)
    return (vs)_mm512_maddubs_epi16((__m512i)codes, (__m512i)activations);
#elif defined(PENSTOCK_256_BITS)
    return (vs)_mm256_maddubs_epi16((__m256i)codes, (__m256i)activations);
#else
    uint8_t a[W * 4];
    int8_t b[W * 4];
    __builtin_memcpy(a, &codes, sizeof a);
    __builtin_memcpy(b, &activations, sizeof b);
    vs sums;
    for (int i = 0; i < W * 2; ++i) {
        const int x = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
        sums[i] = (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
    }
    return sums;
#endif
}

// Sums of two neighbouring products of 16 bits, in 32.
static inline vi dot2_words(vi a, vi b) {
#if defined(PENSTOCK_512_BITS)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(PENSTOCK_256_BITS)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// 32 numbers of 8 bits, one to a word, as bytes in their order.
static inline void put_bytes(const vi (&words)[32 / W], void* to) {
#if defined(PENSTOCK_512_BITS)
    for (int i = 0; i < 2; ++i) _mm_storeu_si128((__m128i*)to + i, _mm512_cvtepi32_epi8((__m512i)words[i]));
#elif defined(PENSTOCK_256_BITS)
    const __m256i first = _mm256_packs_epi32((__m256i)words[0], (__m256i)words[1]);
    const __m256i second = _mm256_packs_epi32((__m256i)words[2], (__m256i)words[3]);
    // Packing goes by halves of a vector.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order));
#else
    int32_t each[32];
    __builtin_memcpy(each, words, sizeof each);
    uint8_t bytes[32];
    for (int i = 0; i < 32; ++i) bytes[i] = (uint8_t)each[i];
    __builtin_memcpy(to, bytes, sizeof bytes);
#endif
}

#if defined(PENSTOCK_512_BITS)
// 64 such numbers, as signed bytes.
static inline vi in_bytes(const vi (&words)[4]) {
    const __m512i first = _mm512_packs_epi32((__m512i)words[0], (__m512i)words[1]);
    const __m512i second = _mm512_packs_epi32((__m512i)words[2], (__m512i)words[3]);
    // Packing goes by quarters of a vector.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (vi)_mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second));
}
#endif

// Numbers of 16 bits, one to a word, in half the room: of each four 0 and 2, then 1 and 3.
static inline vi in_pairs(vi first, vi second) {
#if defined(PENSTOCK_512_BITS)
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const __m512i lower = _mm512_permutex2var_epi64((__m512i)first, even, (__m512i)second);
    const __m512i upper = _mm512_permutex2var_epi64((__m512i)first, odd, (__m512i)second);
#elif defined(PENSTOCK_256_BITS)
    const __m256i lower = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64((__m256i)first, (__m256i)second), 0xd8);
    const __m256i upper = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64((__m256i)first, (__m256i)second), 0xd8);
#else
    int64_t all[W], lower[W / 2], upper[W / 2];
    __builtin_memcpy(all, &first, sizeof first);
    __builtin_memcpy(all + W / 2, &second, sizeof second);
    for (int i = 0; i < W / 2; ++i) lower[i] = all[2 * i], upper[i] = all[2 * i + 1];
#endif
    return (load_bits(&lower) & 0xffff) | load_bits(&upper) << 16;
}

// Sixteen bytes, again and again.
static inline vbytes repeated(const uint8_t* from) {
#if defined(PENSTOCK_512_BITS)
    return (vbytes)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#elif defined(PENSTOCK_256_BITS)
    return (vbytes)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
#else
    vbytes out;
    for (int i = 0; i < W * 4; ++i) out[i] = from[i % 16];
    return out;
#endif
}

// The byte of `table`, which repeats every sixteen, that each of `indices` below 16 has.
static inline vbytes look_up(vbytes table, vbytes indices) {
#if defined(PENSTOCK_512_BITS)
    return (vbytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
#elif defined(PENSTOCK_256_BITS)
    return (vbytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
#else
    vbytes out;
    for (int i = 0; i < W * 4; ++i) out[i] = table[indices[i]];
    return out;
#endif
}

// 16 bits of each lower and upper byte: of each sixteen of these eight to the first, eight to the second.
static inline void interleave(vbytes lower, vbytes upper, vi (&words)[2]) {
#if defined(PENSTOCK_512_BITS)
    words[0] = (vi)_mm512_unpacklo_epi8((__m512i)lower, (__m512i)upper);
    words[1] = (vi)_mm512_unpackhi_epi8((__m512i)lower, (__m512i)upper);
#elif defined(PENSTOCK_256_BITS)
    words[0] = (vi)_mm256_unpacklo_epi8((__m256i)lower, (__m256i)upper);
    words[1] = (vi)_mm256_unpackhi_epi8((__m256i)lower, (__m256i)upper);
#else
    uint16_t out[2][W * 2];
    for (int i = 0; i < W * 4; ++i) out[i % 16 / 8][i / 16 * 8 + i % 8] = (uint16_t)(lower[i] | upper[i] << 8);
    __builtin_memcpy(words, out, sizeof out);
#endif
}

// What `interleave` would make the words of.
static inline void separate(const vi (&words)[2], vbytes& lower, vbytes& upper) {
#if defined(PENSTOCK_512_BITS)
    const __m512i mask = _mm512_set1_epi16(255), first = (__m512i)words[0], second = (__m512i)words[1];
    lower = (vbytes)_mm512_packus_epi16(_mm512_and_si512(first, mask), _mm512_and_si512(second, mask));
    upper = (vbytes)_mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
#elif defined(PENSTOCK_256_BITS)
    const __m256i mask = _mm256_set1_epi16(255), first = (__m256i)words[0], second = (__m256i)words[1];
    lower = (vbytes)_mm256_packus_epi16(_mm256_and_si256(first, mask), _mm256_and_si256(second, mask));
    upper = (vbytes)_mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
#else
    uint16_t from[2][W * 2];
    __builtin_memcpy(from, words, sizeof from);
    for (int i = 0; i < W * 4; ++i) {
        lower[i] = (uint8_t)from[i % 16 / 8][i / 16 * 8 + i % 8];
        upper[i] = (uint8_t)(from[i % 16 / 8][i / 16 * 8 + i % 8] >> 8);
    }
#endif
}

static inline bool has_zeros(vbytes v) {
    uint64_t each[W / 2];
    __builtin_memcpy(each, &v, sizeof each);
    uint64_t all = ~uint64_t{0};
    for (uint64_t one : each) {
        const uint64_t lowest = 0x0101010101010101u;
        all &= ~((one - lowest) & ~one & lowest << 7);
    }
    return all != ~uint64_t{0};
}

// `sums` and the dot products of four unsigned codes with four signed activations, in 32 bits.
static inline vi dot4(vi sums, vi codes, vi activations) {
#if defined(PENSTOCK_AVX512) && defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)activations);
#elif defined(PENSTOCK_AVX2) && defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)activations);
#else
    for (int j = 0; j < 32; j += 8) sums += ((codes >> j) & 255) * ((activations << (24 - j)) >> 24);
    return sums;
#endif
}

// sums + a1 * b1 + a0 * b0 of the bfloat16s in the upper and lower half of each word, which hold no subnormal number.
static inline vf dot2_bf16(vf sums, vi a, vi b) {
#if defined(PENSTOCK_512_BITS) && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    const vi upper = vi{} + (int32_t)0xffff0000u;
    return fma((vf)(a << 16), (vf)(b << 16), fma((vf)(a & upper), (vf)(b & upper), sums));
#endif
}

static inline float to_float(float x) { return x; }

static inline float to_float(int8_t x) { return x; }

static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

static inline void put(float* to, float x) { *to = x; }

// Round to nearest, ties to even; what is not a number stays so.
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {(uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : nearest)};
}

static inline void put(bf16* to, float x) { *to = to_bf16(x); }

// The numbers of two vectors, none of them subnormal, rounded to bfloat16, two to a word in their order.
static inline vi round_pairs(vf first, vf second) {
#if defined(PENSTOCK_512_BITS) && defined(__AVX512BF16__)
    return (vi)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    bf16 rounded[2 * W];
    for (int i = 0; i < W; ++i) rounded[i] = to_bf16(first[i]), rounded[W + i] = to_bf16(second[i]);
    return load_bits(rounded);
#endif
}

// e^x is the result times 2^exponent. Cody and Waite's reduction by ln 2, and the polynomial of Cephes' expf.
static inline vf reduced_exp(vf x, vi& exponent) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = fma(x, splat(1.44269504088896341f), magic);
    const vf n = shifted - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    exponent = (vi)shifted - (vi)magic;
    return fma(p, r * r, r) + 1.0f;
}

// e^x to about 2 units in the last place; 0 below -87.3, infinity above 88.7.
static inline vf exp(vf x) {
    const vf lowest = splat(-87.33654f), greatest = splat(88.72283f);
    vi exponent;
    const vf p = reduced_exp(x < lowest ? lowest : (x > greatest ? greatest : x), exponent);
    // The exponent goes in by halves: 2^128, which the greatest argument needs, is not a number by itself.
    const vi half = exponent >> 1;
    const vf scaled = p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
    const vf result = x < lowest ? vf{} : (x > greatest ? splat(__builtin_inff()) : scaled);
    return x != x ? x : result;
}

// The same for arguments that are not above 0, in two thirds of the time.
static inline vf exp_below_0(vf x) {
    const vf lowest = splat(-87.33654f);
    vi exponent;
    const vf p = reduced_exp(x < lowest ? lowest : x, exponent);
    return x < lowest ? vf{} : p * (vf)((exponent + 127) << 23);
}

// Likewise for what is rounded to bfloat16: 3 millionths off at most. 127 goes in beside the number that rounds, so that
// its lower bits are the power of two.
static inline vf coarse_exp_below_0(vf x) {
    const vf magic = splat(12582912.0f + 127.0f);
    const vf shifted = fma(x, splat(1.44269504088896341f), magic);
    const vf r = fma(shifted - magic, splat(-0.69314718056f), x);
    vf p = splat(4.1513814e-2f);
    p = fma(p, r, splat(1.6787498e-1f));
    p = fma(p, r, splat(5.0003015e-1f));
    p = fma(p, r, splat(9.9996682e-1f));
    p = fma(p, r, splat(1.0f)) * (vf)((vi)shifted << 23);
    return x < splat(-87.33654f) ? vf{} : p;
}

static inline float exp(float x) { return exp(splat(x))[0]; }

// x / (1 + e^-x), by the power that is not above 1, which takes fewer instructions.
static inline vf silu(vf x) {
    const vf power = exp_below_0((vf)((vi)x | INT32_MIN));
    return x * (x < 0.0f ? power : splat(1.0f)) / (power + 1.0f);
}

// Gaussian error linear units by their tanh: x / 2 (1 + tanh u) is x / (1 + e^-2u).
static inline vf gelu_tanh(vf x) {
    const vf cube = x * x * x;
    return x / (1.0f + exp(fma(cube, splat(0.044715f), x) * -1.5957691216057308f));
}

// The same with the normal distribution itself: Abramowitz and Stegun's 7.1.26 for the complementary error function, which
// errs by 1.5e-7 at most.
static inline vf gelu(vf x) {
    const vf z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
    const vf t = 1.0f / fma(z, splat(0.3275911f), splat(1.0f));
    vf p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const vf beyond = p * t * exp_below_0(-z * z) * 0.5f;
    return x * (x < 0.0f ? beyond : 1.0f - beyond);
}

static inline vf quick_gelu(vf x) { return x / (1.0f + exp(x * -1.702f)); }

// Near 0 the polynomial of Cephes' tanhf, because 1 - 2 / (1 + e^2x) cancels there.
static inline vf tanh(vf x) {
    const vf square = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fma(p, square, splat(2.06390887954e-2f));
    p = fma(p, square, splat(-5.37397155531e-2f));
    p = fma(p, square, splat(1.33314422036e-1f));
    p = fma(p, square, splat(-3.33332819422e-1f));
    const vf near = fma(p * square, x, x);
    const vf far = 1.0f - 2.0f / (1.0f + exp(x + x));
    return square < splat(0.390625f) ? near : far;
}

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace penstock::PENSTOCK_ISA
