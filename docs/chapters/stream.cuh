// stream.cuh: a decode step of up to 8 rows as one kernel that never stops reading weights.
//
// A step of few rows is as fast as its weights come from memory, if nothing else gets in the way.
// So one block stays on each SM for the whole step. Its producer warp knows which weights the block
// will multiply, through all layers, and fetches them in that order into a ring in shared memory,
// while the 16 other warps take them out, or wait for what other blocks compute:
//
//            put by the producer ->                      -> taken by 16 warps, a 16th of it each
//   ring:   [    ][on its way][on its way][full][full][full][full][    ]        slots of 16 KB
//
// Only so much is on its way at a time as keeps the memory busy (in_flight). Anything more waits in
// the memory's queues, and whatever else an SM asks for waits behind it: with 32 KB an SM on their
// way a word of another SM is seen after 1,200 clocks, with 160 KB after 10,000.
//
// A phase is a matrix, or attention. Matrices are cut into units of 8 rows; a block has some units
// of each, and takes two of them at a time as the 16 rows of the mma's A: or one of gate and one of
// up. Columns are cut into pieces of 1,024, 64 for each warp; 8 rows of a piece fill a slot. B has
// a column for each row of the step. The warps' sums meet in shared memory:
//
//   words of x  -> B                           barrier                         words of the result
//   slots       -> A   mma -> sums [warp][row] ------> sum of all warps -> norm, bias, ... -> store
//
// There is no barrier of the grid. What one phase hands to the next is made of words, each a number
// and the tag of its use, stored and read at once; whoever needs it reads until the tag is right:
//
//   [ bf16 | tag, 16 bits ]      tag = 2 ((step + 1) (L + 1) + layer) + half
//
// Why a word is never missed: it is overwritten in the next use of its vector, by a block that has
// read another whole vector in between. Each number of that one was stored behind a barrier of a
// block in which all its warps had read what they need of the word's vector; or, for x behind
// attention, by units that had read all queries, keys and values, which were stored so. A block
// without units of a matrix reads nothing for it, and each has some of qkv. Why a tag is not
// mistaken: an old word has the tag of the use before, which is less by 1, 2 or 4, and every use
// replaces all words of its rows. When a step has more rows than the one before, the
// words of the others are older: then the host clears all of them, and steps count from 0 again.
// The words carry all that is handed on, so no fences are needed. All blocks must be on the GPU at
// the same time, which a cooperative launch makes sure of, or fails.
#pragma once

#include <cuda.h>

#include "tensor-cores.cuh"

namespace cuda {

constexpr int kStreamWarps = 16, kStreamThreads = 32 * (kStreamWarps + 4);  // 3 of them idle
constexpr int kStreamRows = 8, kStreamBlocks = 160;  // most of either
constexpr int kSlotBytes = 16 << 10, kMaxSlots = 16;
constexpr int kPieceChunks = kSlotBytes / 1024;  // of 64 columns, one for each warp
constexpr int kPairs = 4;        // of units, between two barriers
constexpr int kHeld = 3;         // pieces of x in a warp's registers: 3,072 columns
constexpr int kPartPages = 16;   // of a context, that another part of it is worth while for
constexpr int kMaxParts = 16;    // of a context
constexpr int kMaxUnits = 16;    // of attention, in a block

enum Phase { kQkv, kO, kGateUp, kDown, kLmHead };  // attention is before kO

struct StreamMaps {
    CUtensorMap each[5];  // of the matrices, [L, K / 64, N, 64]
    CUtensorMap pages;    // of the cache, [blocks * L, 2, KV * HD / 16, 256]: keys, values
};

struct StreamArguments {
    StepArrays s;
    Shape c;
    StreamArguments(const StepArrays& s, const Shape& c) : s(s), c(c) {}
    const bf16* embedding;
    const float *inv_freq, *attn_norms, *mlp_norms;  // [HD / 2], [L + 1, D] with final_norm, [L, D]
    const float *q_norms, *k_norms, *bias;           // [L, HD], [L, HD], [L, qkv], or null
    const int* drawn;
    bf16* kv;
    unsigned *x, *qkv, *att, *h;  // words, [rows, D] etc.; x is times the next norm's weight
    uint64_t* squares;            // [rows, kStreamBlocks]: sums of x^2 in a block, 32-bit tags
    uint4* parts;                 // [rows, KV, G * HD, parts]: Attended and a tag of 32 bits
    float* logits;                // [rows, V]
    unsigned* step;               // steps since the words were cleared
    int columns;                  // that B uses of its 8: rows, rounded up
    int slots, in_flight;         // of the ring; half slots on their way while it is well filled
    unsigned delays;              // for tests: 0, or a seed of pauses
};

// Where number k of a vector stands in its words: of each 16, lane 4 g + t multiplies 2t, 2t + 1,
// 2t + 8 and 2t + 9, which are neighbours.
__device__ int word_at(int k) { return k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2; }

__device__ unsigned use_tag(unsigned step, int layers, int layer, int half) {
    return 2 * ((step + 1) * (layers + 1) + layer) + half;
}
__device__ void store_word(unsigned* to, float value, unsigned tag) {
    unsigned word = unsigned(bf16(value).bits) << 16 | (tag & 0xFFFF);
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ uint4 load_words(const unsigned* from) {
    uint4 w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
    return w;
}

// b = of kCount chunks, stride words apart, the lane's 16 numbers each, packed. All lanes call it:
// they read until all have what they want.
template <int kCount>
__device__ void read_words(const unsigned* from, int stride, unsigned tag, unsigned (*b)[8]) {
    uint4 w[kCount][4];
    unsigned wrong;
    do {
        #pragma unroll
        for (int i = 0; i < kCount; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) w[i][j] = load_words(from + i * stride + 16 * j);
        unsigned each[4] = {};  // so that no long chain forms
        #pragma unroll
        for (int i = 0; i < kCount; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                each[j] |= (w[i][j].x ^ tag) | (w[i][j].y ^ tag);
                each[j] |= (w[i][j].z ^ tag) | (w[i][j].w ^ tag);
            }
        wrong = (each[0] | each[1] | each[2] | each[3]) & 0xFFFF;
    } while (__any_sync(~0u, wrong));
    #pragma unroll
    for (int i = 0; i < kCount; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            b[i][2 * j] = __byte_perm(w[i][j].x, w[i][j].y, 0x7632);
            b[i][2 * j + 1] = __byte_perm(w[i][j].z, w[i][j].w, 0x7632);
        }
}

// The sum of squares of a block's part of x, with a tag of 32 bits; and that of count blocks, by a
// warp, which may do something else between load and sum.
__device__ void store_squares(uint64_t* to, float value, unsigned tag) {
    uint64_t pair = uint64_t(tag) << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
struct Squares {
    uint64_t pairs[kStreamBlocks / 32];

    __device__ void load(const uint64_t* from, int count) {
        #pragma unroll
        for (int i = 0; i < kStreamBlocks / 32; i++)
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(pairs[i]) : "l"(
                             from + min(i * 32 + int(threadIdx.x % 32), count - 1)) : "memory");
    }
    __device__ float sum(const uint64_t* from, int count, unsigned tag) {
        for (bool wait = true; wait;) {
            wait = false;
            for (uint64_t pair : pairs) wait |= unsigned(pair >> 32) != tag;
            if ((wait = __any_sync(~0u, wait))) load(from, count);
        }
        float sum = 0;
        for (int i = 0; i < kStreamBlocks / 32; i++)
            if (i * 32 + int(threadIdx.x % 32) < count) sum += __uint_as_float(unsigned(pairs[i]));
        return sum_of_warp(sum);
    }
};

// One component of what a part of a context gives, as one word.
__device__ void store_part(uint4* to, const Attended& a, unsigned tag) {
    uint64_t low = uint64_t(__float_as_uint(a.top)) << 32 | __float_as_uint(a.out);
    uint64_t high = uint64_t(tag) << 32 | __float_as_uint(a.sum);
    asm volatile("{ .reg .b128 word; mov.b128 word, {%1, %2};"
                 " st.relaxed.gpu.global.b128 [%0], word; }" ::"l"(to), "l"(low), "l"(high)
                 : "memory");
}
__device__ Attended read_part(const uint4* from, unsigned tag) {
    uint64_t low, high;
    do asm volatile("{ .reg .b128 word; ld.relaxed.gpu.global.b128 word, [%2];"
                    " mov.b128 {%0, %1}, word; }" : "=l"(low), "=l"(high) : "l"(from) : "memory");
    while (unsigned(high >> 32) != tag);
    return {__uint_as_float(unsigned(low >> 32)), __uint_as_float(unsigned(high)),
            __uint_as_float(unsigned(low))};
}

// A matrix, as one block sees it. N: of its results, for a row of the step.
struct StreamMatrix {
    int K, N, up, first, units;  // up: how far the rows of up are behind those of gate, or 0
    const unsigned* in;          // words
    unsigned* out;
    const float* extra;          // [L, N]: the next norm's weights, or the bias; or null

    __device__ void set(const StreamArguments& a, int phase) {
        const Shape& c = a.c;
        in = phase == kO ? a.att : phase == kDown ? a.h : a.x;
        out = phase == kQkv ? a.qkv : phase == kGateUp ? a.h : a.x;
        extra = phase == kO ? a.mlp_norms : phase == kDown ? a.attn_norms + c.hidden
              : phase == kQkv ? a.bias : nullptr;
        K = phase == kO ? c.heads * c.head_dim : phase == kDown ? c.intermediate : c.hidden;
        N = phase == kQkv ? c.qkv_dim() : phase == kGateUp ? c.intermediate
          : phase == kLmHead ? c.vocab : c.hidden;
        up = phase == kGateUp ? c.intermediate : 0;
        int all = (N + 7) / 8, count = blocks(N), block = blockIdx.x;
        first = block < count ? all * block / count : 0;
        units = block < count ? all * (block + 1) / count - first : 0;
    }
    __device__ static int blocks(int N) { return min((N + 7) / 8, int(gridDim.x)); }
    __device__ int pieces() const { return (K / 64 + kPieceChunks - 1) / kPieceChunks; }
    __device__ int pairs() const { return up ? units : (units + 1) / 2; }
    __device__ int boxes(int pair) const { return up || 2 * pair + 1 < units ? 2 : 1; }
    __device__ int row(int pair, int box) const {
        return up ? (first + pair) * 8 + box * up : (first + 2 * pair + box) * 8;
    }
};

// The part of a context that a block attends to, for a row and a kv head.
struct StreamUnit {
    int row, head, parts, part, first, last;  // pages first .. last - 1 of the sequence
    int tokens, newest;  // of the whole context; its last block
    int parts_at;        // where its parts are, in units
    const int* table;

    __device__ void set(const StreamArguments& a, int rows, int unit) {
        int most = most_parts(a, rows);
        row = unit / (a.c.kv_heads * most), head = unit / most % a.c.kv_heads, part = unit % most;
        parts_at = unit - part;
        tokens = a.s.positions[row] + 1;
        int pages = (tokens + kBlockSize - 1) / kBlockSize;
        parts = min(most, (pages + kPartPages - 1) / kPartPages);
        first = part < parts ? pages * part / parts : 0;
        last = part < parts ? pages * (part + 1) / parts : 0;
        table = a.s.tables + a.s.sequence[row] * a.s.header->table_width;
        newest = table[pages - 1];
    }
    __device__ static int most_parts(const StreamArguments& a, int rows) {
        return max(1, min(kMaxParts, int(gridDim.x) / (rows * a.c.kv_heads)));
    }
    __device__ static int count(const StreamArguments& a, int rows) {
        return rows * a.c.kv_heads * most_parts(a, rows);
    }
};

// In shared memory, of a block:
__shared__ StreamMatrix matrices[5];     // its part of each,
__shared__ StreamUnit units[kMaxUnits];  // and of attention;
__shared__ alignas(16) float head_norms[2 * 128];                // [2, HD], of queries and keys;
__shared__ alignas(16) bf16 heads[(kMaxGroup + 2) * (128 + 8)];  // queries, key, value of a unit

// The ring, and where in it a warp is: addresses in shared memory.
struct Ring {
    unsigned data, full, empty;
    int slots, slot = 0, parity = 0;

    __device__ unsigned at() const { return data + slot * kSlotBytes; }
    __device__ unsigned full_at(int half) const { return full + (2 * slot + half) * 8; }
    __device__ unsigned empty_at() const { return empty + slot * 8; }
    __device__ void next() {
        if (++slot == slots) slot = 0, parity ^= 1;
    }
    __device__ unsigned take(int half) {  // waits for it; returns where the slot is
        Barrier::wait(full_at(half), parity);
        return at();
    }
    __device__ void release() {  // by all lanes
        __syncwarp();
        if (threadIdx.x % 32 == 0) Barrier::arrive(empty_at());
        next();
    }
};

// Lets the copy engine bring a box of a tensor to an address; one lane calls it. The barrier, which
// was told of the bytes (expect), is full when all of them are there.
__device__ void copy_box(const CUtensorMap* map, int row, int at2, int at3, unsigned to,
                         unsigned barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(map), "r"(0), "r"(row),
                 "r"(at2), "r"(at3), "r"(barrier) : "memory");
#endif
}

// What the producer warp does.
template <int HD>
struct Producer {
    const StreamArguments& a;
    Ring ring, arriving;       // arriving: the slot of the oldest half that is on its way
    int flying = 0, half = 0;  // so many are; which half the oldest is

    // Waits for a free slot; returns how many halves may be on their way: twice as many, if less
    // than half of the ring is filled.
    __device__ int next_slot() {
        Barrier::wait(ring.empty_at(), ring.parity ^ 1);
        Ring ahead = ring;
        ahead.slot += a.slots / 2;
        if (ahead.slot >= ahead.slots) ahead.slot -= ahead.slots, ahead.parity ^= 1;
        return Barrier::test(ahead.empty_at(), ahead.parity ^ 1) ? 2 * a.in_flight : a.in_flight;
    }
    __device__ void one_more(int most) {
        for (; flying >= most; flying--) {
            arriving.take(half);
            if (half ^= 1; half == 0) arriving.next();
        }
        flying++;
    }

    __device__ void matrix(const CUtensorMap* map, const StreamMatrix& m, int layer) {
        int pieces = m.pieces(), pairs = m.pairs(), bytes = min(kPieceChunks / 2, m.K / 64) * 1024;
        for (int begin = 0; begin < pairs; begin += kPairs)
            for (int p0 = 0; p0 < pieces; p0 += kHeld)
                for (int n = begin; n < min(begin + kPairs, pairs); n++)
                    for (int p = p0; p < min(p0 + kHeld, pieces); p++)
                        for (int box = 0; box < m.boxes(n); box++)
                            fetch_box(map, p * kPieceChunks, m.row(n, box), layer, bytes);
    }
    __device__ void fetch_box(const CUtensorMap* map, int chunk, int row, int layer, int bytes) {
        int most = next_slot();
        #pragma unroll 1
        for (int i = 0; i < 2; i++) {
            one_more(most);
            if (threadIdx.x % 32 == 0) {
                Barrier::expect(ring.full_at(i), bytes);
                copy_box(map, row, chunk + i * kPieceChunks / 2, layer,
                         ring.at() + i * kSlotBytes / 2, ring.full_at(i));
            }
        }
        __syncwarp();  // each lane waits for itself; none may fall behind by a turn of the ring
        ring.next();
    }

    __device__ void pages(const CUtensorMap* map, int count, int layer) {
        constexpr int kPage = 2 * HD * kBlockSize * sizeof(bf16);  // keys and values
        constexpr int kPages = kSlotBytes / 2 / kPage;  // of a half, at most 32
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < count; i++) {
            const StreamUnit& u = units[i];
            for (int p = u.first; p < u.last; p += 2 * kPages) {
                next_slot();
                #pragma unroll 1
                for (int j = 0; j < 2; j++) {
                    int first = p + j * kPages, pages = max(0, min(kPages, u.last - first));
                    one_more(2 * a.in_flight);  // few blocks do this, and all wait for them
                    if (lane == 0) Barrier::expect(ring.full_at(j), pages * kPage);
                    __syncwarp();
                    if (lane < pages)
                        copy_box(map, u.head * HD / 16, 0,
                                 u.table[first + lane] * a.c.layers + layer,
                                 ring.at() + j * kSlotBytes / 2 + lane * kPage, ring.full_at(j));
                }
                ring.next();
            }
        }
    }
};

// What the other warps do.
template <int HD>
struct Consumer {
    static constexpr int kColumn = 16 * kPairs + 4, kOut = HD + 4;  // 4: against bank conflicts
    static constexpr int kHead = HD + 8;  // the same, for numbers of 16 bits

    const StreamArguments& a;
    Ring ring;
    float *sums;    // [2, warps, columns + 1, kColumn]; attention: [warps, G, kOut] and more
    float* x;       // [columns, rows of the block], the residual stream
    float* angles;  // [columns, HD], cosines and sines
    int rows;       // of the step
    unsigned step;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, turn = 0;

    __device__ unsigned tag(int layer, int half) const {
        return use_tag(step, a.c.layers, layer, half);
    }
    __device__ static void barrier() {
        asm volatile("bar.sync 1, %0;" ::"n"(32 * kStreamWarps) : "memory");
    }
    __device__ void pause(unsigned where) {  // for tests
        if (!a.delays) return;
        unsigned random = (a.delays + where * 127 + blockIdx.x * 8191) * 2654435761u;
        random = (random ^ random >> 15) * 0x2c1b3c6du;
        if ((random >> 8) % 8 == 0) __nanosleep((random >> 12) % 20000);
    }

    // A lane's share of the warp's 8x64 chunk, whose 16-byte pieces the copy engine swizzled.
    __device__ void take_box(uint4 to[2]) {
        unsigned at = ring.take(warp / 8) + warp * 1024;
        at += lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
        to[0] = ldmatrix<false>(at), to[1] = ldmatrix<false>(at ^ 64);
        ring.release();
    }

    // Begins to copy them into shared memory; project waits for it.
    __device__ void fetch_norms(int layer) {
        if (int i = threadIdx.x * 4; i < 2 * HD && a.q_norms)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                             shared_address(head_norms + i)),
                         "l"((i < HD ? a.q_norms : a.k_norms - HD) + layer * HD + i) : "memory");
    }

    // x = the embeddings, row by row by the first warps.
    __device__ void embed() {
        const StreamMatrix& m = matrices[kDown];
        if (warp >= rows || m.units == 0) return;
        int id = a.s.ids[warp];
        if (id < 0) id = a.drawn[-1 - id];
        float squares = 0;
        for (int i = lane; i < 8 * m.units; i += 32) {
            int n = 8 * m.first + i;
            float value = a.embedding[size_t(id) * m.N + n];
            x[warp * 8 * m.units + i] = value;
            squares += value * value;
            store_word(a.x + warp * m.N + word_at(n), value * a.attn_norms[n], tag(0, 0));
        }
        store_norm(squares, tag(0, 0));
    }
    __device__ void store_norm(float squares, unsigned tag) {
        squares = sum_of_warp(squares);
        if (lane == 0) store_squares(a.squares + warp * kStreamBlocks + blockIdx.x, squares, tag);
    }

    // Adds up the warps' sums of a row between two barriers, which is row at of the block's, and
    // hands the result on. Returns the square of the new x. more: the next norm's weight, or bias.
    __device__ float finish(const StreamMatrix& m, int phase, int at, int row, float factor,
                            float more, unsigned out_tag) {
        const int n = 8 * m.first + at;
        auto sum_up = [&](int row) {
            const float* from = sums + (turn * kStreamWarps * (a.columns + 1) + warp) * kColumn;
            float sum[2] = {};
            #pragma unroll
            for (int w = 0; w < kStreamWarps; w++)
                sum[w % 2] += from[w * (a.columns + 1) * kColumn + row];
            return (sum[0] + sum[1]) * factor;
        };
        float value = sum_up(m.up ? row / 8 * 16 + row % 8 : row), square = 0;
        if (phase == kLmHead) {
            if (n < m.N) a.logits[size_t(warp) * m.N + n] = value;
            return 0;
        }
        if (phase == kO || phase == kDown) {
            value = x[warp * 8 * m.units + at] += value;
            square = value * value;
            value *= more;
        } else if (m.up) {
            value = value / (1 + __expf(-value)) * sum_up(row / 8 * 16 + row % 8 + 8);
        } else {
            value += more;
        }
        store_word(m.out + warp * m.N + word_at(n), value, out_tag);
        return square;
    }

    // The block's part of a matrix times its words.
    __device__ void project(int phase, int layer) {
        const StreamMatrix m = matrices[phase];
        if (m.units == 0) return;
        const bool adds = phase == kO || phase == kDown;  // to x; the others take the norm of x
        const unsigned in_tag = tag(layer, phase == kGateUp);
        const unsigned out_tag = phase == kDown ? tag(layer + 1, 0) : tag(layer, phase == kO);
        const float* extra = m.extra + (m.extra ? size_t(layer) * m.N : 0);
        const int pieces = m.pieces(), pairs = m.pairs(), of_pair = m.up ? 8 : 16;
        const int row = g < rows ? g : 0;  // columns of B that are too many repeat the first
        float squares = 0, factor = 1;
        Squares of_x;
        pause(2 * in_tag + adds);
        #pragma unroll 1
        for (int begin = 0; begin < pairs; begin += kPairs) {
            // a warp stores the results of the step's row of its number: rows first .. + end of m
            const int end = warp < rows ? min(min(kPairs, pairs - begin) * of_pair,
                                              m.units * 8 - begin * of_pair) : 0;
            const int first = 8 * m.first + begin * of_pair;
            float more = m.extra && lane < end ? extra[first + lane] : 0;
            float* to[2];  // for columns 2t, 2t + 1; there is one more for those that are not used
            for (int i = 0; i < 2; i++)
                to[i] = sums + g + kColumn * ((turn * kStreamWarps + warp) * (a.columns + 1) +
                                              min(2 * t + i, a.columns));
            #pragma unroll 1
            for (int p0 = 0; p0 < pieces; p0 += kHeld) {
                int chunk = p0 * kPieceChunks + warp;
                int count = (m.K / 64 - chunk + kStreamWarps - 1) / kStreamWarps;
                unsigned b[kHeld][8];
                const unsigned* from = m.in + row * m.K + chunk * 64 + t * 4;
                if (count > 2) read_words<3>(from, 64 * kStreamWarps, in_tag & 0xFFFF, b);
                else if (count > 1) read_words<2>(from, 64 * kStreamWarps, in_tag & 0xFFFF, b);
                else if (count > 0) read_words<1>(from, 64 * kStreamWarps, in_tag & 0xFFFF, b);
                if (!adds && begin == 0 && p0 == 0 && warp < rows)
                    of_x.load(a.squares + warp * kStreamBlocks, StreamMatrix::blocks(a.c.hidden));
                #pragma unroll 1
                for (int n = 0; n < min(kPairs, pairs - begin); n++) {
                    const bool two = m.boxes(begin + n) == 2;
                    float sum[2][4] = {};
                    #pragma unroll
                    for (int p = 0; p < kHeld; p++) {
                        if (p0 + p >= pieces) break;
                        uint4 low[2], high[2] = {};
                        take_box(low);
                        if (two) take_box(high);
                        #pragma unroll
                        for (int i = 0; i < 2; i++) {
                            if (p >= count) break;
                            const unsigned* x = b[p] + 4 * i;
                            mma(sum[i], low[i].x, high[i].x, low[i].y, high[i].y, x[0], x[1]);
                            mma(sum[i], low[i].z, high[i].z, low[i].w, high[i].w, x[2], x[3]);
                        }
                    }
                    float before[4] = {};
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (p0) before[i] = to[i % 2][16 * n + i / 2 * 8];
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        to[i % 2][16 * n + i / 2 * 8] = sum[0][i] + sum[1][i] + before[i];
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");  // the norms
            if (!adds && begin == 0 && warp < rows)
                factor = rsqrtf(of_x.sum(a.squares + warp * kStreamBlocks,
                                         StreamMatrix::blocks(a.c.hidden), in_tag) /
                                    a.c.hidden + a.c.norm_eps);
            barrier();
            for (int i = lane; i < end; i += 32) {
                squares += finish(m, phase, begin * of_pair + i, i, factor, more, out_tag);
                more = m.extra && i + 32 < end ? extra[first + i + 32] : 0;
            }
            turn ^= 1;
        }
        if (adds && warp < rows) store_norm(squares, out_tag);
    }

    // Puts a head of a row into heads[to]: with norm (Qwen3) and RoPE, if it is of queries or keys.
    __device__ void read_head(int row, int head, int to, unsigned tag) {
        constexpr int kEach = HD / 32, kHalf = kEach / 2;
        const unsigned* from = a.qkv + row * a.c.qkv_dim();
        const bool value = head >= a.c.heads + a.c.kv_heads;
        unsigned w[kEach], wrong;
        do {
            wrong = 0;
            #pragma unroll
            for (int i = 0; i < kEach; i++) {
                const unsigned* at = from + word_at(head * HD + 32 * i + lane);
                asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w[i]) : "l"(at)
                             : "memory");
            }
            #pragma unroll
            for (int i = 0; i < kEach; i++) wrong |= (w[i] ^ tag) & 0xFFFF;
        } while (__any_sync(~0u, wrong));
        float v[kEach], sum = 0;
        #pragma unroll
        for (int i = 0; i < kEach; i++) {
            v[i] = __uint_as_float(w[i] & 0xFFFF0000);
            sum += v[i] * v[i];
        }
        if (a.q_norms && !value) {
            float factor = rsqrtf(sum_of_warp(sum) / HD + a.c.norm_eps);
            const float* weight = head_norms + (head < a.c.heads ? 0 : HD) + lane;
            #pragma unroll
            for (int i = 0; i < kEach; i++) v[i] *= factor * weight[32 * i];
        }
        #pragma unroll
        for (int i = 0; i < kHalf; i++) {
            float cosine = angles[row * HD + 32 * i + lane], x = v[i], y = v[i + kHalf];
            float sine = angles[row * HD + HD / 2 + 32 * i + lane];
            if (value) cosine = 1, sine = 0;
            heads[to * kHead + 32 * i + lane] = bf16(x * cosine - y * sine);
            heads[to * kHead + 32 * (i + kHalf) + lane] = bf16(y * cosine + x * sine);
        }
    }

    // Puts the new token's key and value where they belong in a page's keys and values.
    __device__ void put_token(const StreamUnit& u, bf16* keys, bf16* values) {
        const int i = lane % 16, G = a.c.heads / a.c.kv_heads;  // 8 numbers; of the key, the value
        if (i < HD / 8)
            *(uint4*)((lane < 16 ? keys : values) +
                      a.c.keys.at((u.tokens - 1) % kBlockSize, 8 * i)) =
                *(const uint4*)(heads + (G + lane / 16) * kHead + 8 * i);
    }

    // A page: as in decode_attend, S^T = K Q^T, O^T = V^T P^T. tokens: of the page
    __device__ void add_page(const bf16* keys, int tokens, int G, float (*o)[4], float top[2],
                             float sum[2]) {
        const bf16* values = keys + HD * kBlockSize;
        float p[4] = {};
        #pragma unroll
        for (int i = 0; i < HD / 32; i++) {
            uint4 low = load_matrices<false>(keys + 256 * i);
            uint4 high = load_matrices<false>(keys + 256 * i + 8 * HD);
            uint4 q = ldmatrix<false>(shared_address(heads + min(lane % 8, G - 1) * kHead +
                                                     32 * i + lane / 8 * 8));
            mma(p, low.x, high.x, low.y, high.y, q.x, q.y);
            mma(p, low.z, high.z, low.w, high.w, q.z, q.w);
        }
        auto [p0, p1] = weigh<HD>(p, g < tokens, g + 8 < tokens, o, top, sum);
        #pragma unroll
        for (int i = 0; i < HD / 32; i++) {
            uint4 low = load_matrices<true>(values + 256 * i);
            uint4 high = load_matrices<true>(values + 256 * i + 8 * HD);
            mma(o[2 * i], low.x, low.y, high.x, high.y, p0, p1);
            mma(o[2 * i + 1], low.z, low.w, high.z, high.w, p0, p1);
        }
    }

    // A unit of attention, to the words of att.
    __device__ void attend(const StreamUnit& u, int layer) {
        if (u.first == u.last) return;
        constexpr int kPages = kSlotBytes / (4 * HD * kBlockSize);
        const int H = a.c.heads, KV = a.c.kv_heads, G = H / KV, size = G * HD;
        const int pages = u.last - u.first;
        const unsigned now = tag(layer, 0);
        pause(3 * now);
        for (int i = warp; i < G + 2; i += kStreamWarps)
            read_head(u.row, i < G ? u.head * G + i : H + u.head + (i - G) * KV, i, now & 0xFFFF);
        barrier();  // also: nobody needs the sums of q, k, v any more
        float o[HD / 16][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};  // of heads 2t, 2t + 1
        #pragma unroll 1
        for (int p = 0; p < pages; p += kPages) {
            bf16* slot = (bf16*)__cvta_shared_to_generic(ring.take(0));
            ring.take(1);
            int mine = (warp - p) & (kStreamWarps - 1), page = u.first + p + mine;
            if (mine < kPages && page < u.last) {
                slot += mine * 2 * HD * kBlockSize;
                const bool newest = page == (u.tokens - 1) / kBlockSize;
                if (newest) {
                    put_token(u, slot, slot + HD * kBlockSize);
#if __CUDA_ARCH__ >= 900
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // before reuse
#endif
                    __syncwarp();
                }
                add_page(slot, u.tokens - page * kBlockSize, G, o, top, sum);
                if (newest) {
                    bf16* to = a.kv + a.c.key_page(u.newest, layer, u.head);
                    put_token(u, to, to + a.c.value_offset());
                }
            }
            ring.release();
        }

        // the warps' parts become one; those of the blocks are shared out among them
        float *tops = sums + kStreamWarps * G * kOut, *weights = tops + kStreamWarps * G;
        for (int e = 0; e < 2; e++) {
            int head = 2 * t + e;
            for (int n = 4; n < 32; n *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], n);
            if (head >= G) continue;
            if (g == 0) tops[warp * G + head] = top[e], weights[warp * G + head] = sum[e];
            float* to = sums + (warp * G + head) * kOut + g;
            #pragma unroll
            for (int i = 0; i < HD / 16; i++) to[16 * i] = o[i][e], to[16 * i + 8] = o[i][e + 2];
        }
        barrier();
        unsigned* att = a.att + u.row * H * HD;
        uint4* parts = a.parts + u.parts_at * size;
        auto store = [&](int i, const Attended& all) {
            store_word(att + word_at(u.head * size + i), all.out / all.sum, now);
        };
        #pragma unroll 1
        for (int i = threadIdx.x; i < size; i += 32 * kStreamWarps) {
            Attended all = merge<kStreamWarps>(kStreamWarps, [&](int w) {
                int head = w * G + i / HD;
                return Attended{tops[head], weights[head], sums[head * kOut + i % HD]};
            });
            if (u.parts == 1) store(i, all);
            else store_part(&parts[i * u.parts + u.part], all, now);
        }
        barrier();
        if (u.parts == 1) return;
        int first = size * u.part / u.parts, count = size * (u.part + 1) / u.parts - first;
        Attended* got = (Attended*)sums;
        #pragma unroll 1
        for (int i = threadIdx.x; i < count * u.parts; i += 32 * kStreamWarps)
            got[i] = read_part(&parts[first * u.parts + i], now);
        barrier();
        #pragma unroll 1
        for (int i = threadIdx.x; i < count; i += 32 * kStreamWarps)
            store(first + i, merge(u.parts, [&](int z) { return got[i * u.parts + z]; }));
        barrier();
    }
};

// Floats in shared memory beside the ring: where the sums, x and the angles begin, and their end.
template <int HD>
__host__ __device__ int stream_floats(const Shape& c, int columns, int blocks, int part) {
    using Warps = Consumer<HD>;
    int projected = 2 * kStreamWarps * (columns + 1) * Warps::kColumn;
    int attended = kStreamWarps * (c.heads / c.kv_heads) * (Warps::kOut + 2);
    int ends[] = {0, projected > attended ? projected : attended,
                  8 * columns * ((c.hidden / 8 + blocks - 1) / blocks), columns * HD};
    for (int i = 1; i < 4; i++) ends[i] += ends[i - 1];
    return ends[part];
}

template <int HD>
__global__ void __launch_bounds__(kStreamThreads, 1)
stream_step(const __grid_constant__ StreamMaps maps, const __grid_constant__ StreamArguments a) {
    extern __shared__ char stream_shared[];
    __shared__ Barrier full[kMaxSlots][2], empty[kMaxSlots];
    const Shape& c = a.c;
    char* data = stream_shared + (-shared_address(stream_shared) & 1023);  // as swizzles count
    float* floats = (float*)(data + a.slots * kSlotBytes);
    auto part = [&](int i) { return floats + stream_floats<HD>(c, a.columns, gridDim.x, i); };
    if (int i = threadIdx.x; i < a.slots)
        full[i][0].init(1), full[i][1].init(1), empty[i].init(kStreamWarps);
    wait_for_previous();
    const int rows = a.s.header->rows;
    const int count = (StreamUnit::count(a, rows) + gridDim.x - 1 - blockIdx.x) / gridDim.x;
    if (int i = threadIdx.x; i < count) units[i].set(a, rows, i * gridDim.x + blockIdx.x);
    if (int i = threadIdx.x; i < 5) matrices[i].set(a, i);
    __syncthreads();
    Ring ring = {shared_address(data), shared_address(full), shared_address(empty), a.slots};
    asm("" : "+r"(ring.data), "+r"(ring.full), "+r"(ring.empty));  // not worked out anew each time
    const unsigned step = *a.step;
    if (threadIdx.x / 32 >= kStreamWarps) {
        registers<32, false>();
        if (threadIdx.x / 32 > kStreamWarps) return;
        Producer<HD> producer = {a, ring, ring};
        #pragma unroll 1
        for (int i = 0; i <= 4 * c.layers; i++) {
            int layer = i / 4, phase = layer < c.layers ? i % 4 : kLmHead;
            if (phase == kO) producer.pages(&maps.pages, count, layer);
            producer.matrix(&maps.each[phase], matrices[phase], phase == kLmHead ? 0 : layer);
        }
        return;
    }
    registers<112, true>();
    Consumer<HD> me = {a, ring, part(0), part(1), part(2), rows, step};
    for (int i = threadIdx.x; i < rows * HD / 2; i += 32 * kStreamWarps) {
        int row = i / (HD / 2), j = i % (HD / 2);
        float* angle = me.angles + row * HD + j;
        sincosf(float(a.s.positions[row]) * a.inv_freq[j], angle + HD / 2, angle);
    }
    me.barrier();
    me.embed();
    #pragma unroll 1
    for (int i = 0; i <= 4 * c.layers; i++) {
        int layer = i / 4, phase = layer < c.layers ? i % 4 : kLmHead;
        if (phase == kQkv) me.fetch_norms(layer);
        for (int j = 0; j < count && phase == kO; j++) me.attend(units[j], layer);
        me.project(phase, layer);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.step = step + 1;
}

// Base: CudaDevice, or a chapter over it; its pages must lie as matrix_pages says.
template <class Base>
class Stream : public Base {
public:
    Stream(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          on(this->switched_on("stream", not_for(), {"decode_step"}, " (up to 8 rows)")) {
        if (on) set_up();
    }

    void reserve(int count) override {
        Base::reserve(count);
        const cuuint64_t heads = this->c.kv_heads, rows = this->c.head_dim / 16;  // of 256 numbers
        const cuuint64_t offset = this->c.value_offset(), pages = size_t(count) * this->c.layers;
        if (on) maps.pages = map_tensor(this->kv, {256, heads * rows, 2, pages},
                                        {256, offset, 2 * offset}, {256, cuuint32_t(rows), 2, 1},
                                        CU_TENSOR_MAP_SWIZZLE_NONE);
    }

protected:
    // Clears the words before a step for which old ones may be there: see above.
    void before_step(const StepArrays& s) override {
        Base::before_step(s);
        if (takes(s)) ready_words(s.rows);
    }
    void ready_words(int rows) {
        const bool stale = rows > streamed_rows || ++streamed_steps == 1 << 20;
        streamed_rows = rows;
        if (!stale) return;
        streamed_steps = 0;
        check(cudaMemsetAsync(words, 0, words_bytes, this->stream), "words");
    }

    // A step of up to s.rows rows, up to its logits.
    bool decode_step(const StepArrays& s) override {
        if (!takes(s)) return Base::decode_step(s);
        arguments->s = s, arguments->kv = this->kv;
        arguments->columns = int(std::bit_ceil(unsigned(s.rows)));
        arguments->slots = slots_beside(arguments->columns);
        // large layers need the memory's bandwidth, small ones words that do not queue behind it
        const Shape& c = this->c;
        size_t layer = sizeof(bf16) * (size_t(c.qkv_dim() + c.q_dim()) * c.hidden +
                                       size_t(3) * c.intermediate * c.hidden);
        bool large = layer / blocks > size_t(4 * arguments->slots) * kSlotBytes;
        arguments->in_flight = large ? 4 : 2;
        cudaLaunchAttribute all_at_once;
        all_at_once.id = cudaLaunchAttributeCooperative;
        all_at_once.val.cooperative = 1;
        cudaLaunchConfig_t config = {dim3(blocks), dim3(kStreamThreads), size_t(shared_bytes),
                                     this->stream, &all_at_once, 1};
        check(cudaLaunchKernelEx(&config, kernel, maps, *arguments), "stream_step");
        return true;
    }
    bool takes(const StepArrays& s) const { return on && s.one_each && s.rows <= kStreamRows; }

    // Why this model or GPU cannot be streamed; "": it can.
    string not_for() {
        const Shape& c = this->c;
        if ((c.head_dim != 64 && c.head_dim != 128) || c.group() > kMaxGroup)
            return "attention of this shape is not built in";
        kernel = c.head_dim == 64 ? stream_step<64> : stream_step<128>;
        if (!runs_hopper_code((const void*)kernel)) return "no code for Hopper that this GPU runs";
        if (c.hidden % 64 || c.intermediate % 64) return "sizes are not multiples of 64";
        cudaDeviceProp device;
        check(cudaGetDeviceProperties(&device, this->ordinal), "device");
        blocks = std::min({device.multiProcessorCount, kStreamBlocks, (c.qkv_dim() + 7) / 8});
        cudaFuncAttributes code;
        check(cudaFuncGetAttributes(&code, kernel), "stream_step");
        shared_bytes = int(device.sharedMemPerBlockOptin - code.sharedSizeBytes);
        bool units_fit = kStreamRows * c.kv_heads <= kMaxUnits * blocks;
        return slots_beside(kStreamRows) >= 5 && units_fit ? "" : "shared memory does not suffice";
    }

    void set_up() {
        const Shape& c = this->c;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   shared_bytes), "stream_step");
        for (int p = 0; p < 5; p++)
            maps.each[p] = map_weights(this->weights[p].data, this->weights[p].N,
                                       this->weights[p].K, p == kLmHead ? 1 : c.layers);
        arguments.emplace(StepArrays(), c);
        arguments->embedding = this->embed_table, arguments->drawn = this->drawn;
        arguments->logits = this->logits, arguments->delays = 0;
        arguments->attn_norms = this->attn_norms, arguments->mlp_norms = this->mlp_norms;
        arguments->q_norms = this->q_norms, arguments->k_norms = this->k_norms;
        arguments->bias = this->biases, arguments->inv_freq = this->inv_freq;
        words_bytes = place_words(0);
        words = this->template make<char>(words_bytes);
        place_words(uintptr_t((char*)words));
    }

    // Places the words at an address; 0: only measures. Returns where they end.
    uintptr_t place_words(uintptr_t at) {
        const Shape& c = this->c;
        const size_t rows = kStreamRows, units = std::max<size_t>(blocks, rows * c.kv_heads);
        StreamArguments& a = *arguments;
        Carver carver = {at};
        carver.take(a.parts, units * c.group() * c.head_dim);
        carver.take(a.squares, rows * kStreamBlocks), carver.take(a.x, rows * c.hidden);
        carver.take(a.qkv, rows * c.qkv_dim()), carver.take(a.att, rows * c.q_dim());
        carver.take(a.h, rows * c.intermediate), carver.take(a.step, 1);
        return carver.at;
    }

    // w [layers, N, K], for boxes of 8 rows.
    static CUtensorMap map_weights(const bf16* w, size_t N, size_t K, size_t layers) {
        unsigned chunks = unsigned(std::min<size_t>(kPieceChunks / 2, K / 64));
        return map_tensor(w, {64, N, K / 64, layers}, {K, 64, N * K}, {64, 8, chunks, 1},
                          CU_TENSOR_MAP_SWIZZLE_128B);
    }

    // Of four dimensions, the innermost first; strides: of the others, in numbers.
    static CUtensorMap map_tensor(const bf16* from, std::array<cuuint64_t, 4> sizes,
                                  std::array<cuuint64_t, 3> strides, std::array<cuuint32_t, 4> box,
                                  CUtensorMapSwizzle swizzle) {
        CUtensorMap map;
        void* encode;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                               cudaEnableDefault, &found), "tensor map");
        for (cuuint64_t& stride : strides) stride *= sizeof(bf16);
        const cuuint32_t ones[] = {1, 1, 1, 1};
        if (decltype(&cuTensorMapEncodeTiled)(encode)(
                &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void*)from, sizes.data(),
                strides.data(), box.data(), ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
            fail("CUDA: no tensor map of ", sizes[3], " x ", sizes[2], " x ", sizes[1]);
        return map;
    }

    // Slots of the ring of a step with so many columns.
    int slots_beside(int columns) const {
        auto floats = this->c.head_dim == 64 ? stream_floats<64> : stream_floats<128>;
        int taken = floats(this->c, columns, blocks, 3) * int(sizeof(float)) + 1024;
        return std::min((shared_bytes - taken) / kSlotBytes, kMaxSlots);
    }

    decltype(&stream_step<64>) kernel;
    int blocks = 0, shared_bytes = 0, streamed_rows = 0, streamed_steps = 0;
    const bool on;
    std::optional<StreamArguments> arguments;
    StreamMaps maps;
    size_t words_bytes = 0;
    typename Base::template Array<char> words;
};

}  // namespace cuda
