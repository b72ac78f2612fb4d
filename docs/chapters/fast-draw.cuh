// fast-draw.cuh: a draw by eight thread blocks instead of one, on GPUs that have clusters (Hopper).
//
// What it replaces: draw_id by a team of one block (sampler.hpp), where a single multiprocessor
// reads and weighs all logits.
// How: a cluster's blocks run at the same time and can wait for each other, so they are one team of
// 4,096 threads. Where top-k keeps few candidates, the blocks write them into a list, and the first
// block cuts and draws from it alone. On other GPUs the cluster has one block, and only the list
// makes a difference. Ids are those that draw_id draws, to the last bit of the logits.
#pragma once

#include "tensor-cores.cuh"

namespace cuda {

constexpr int kDrawThreads = 512, kDrawBlocks = 8;  // threads of a block; blocks of a cluster
constexpr int kListedTopK = kDrawThreads / 4;  // for a larger k the list may overflow

// What the blocks of a cluster exchange, in global memory. count and sums are zero between draws.
struct DrawScratch {
    unsigned long long parts[4][kDrawBlocks], sums[3][kBins];
    int count, list[kDrawThreads];
};

// The team of all threads of a cluster. It has no scratch in common: each block has its own, with a
// histogram of what its own threads add, so a barrier is one of the block. Where that makes a
// difference, functions of sampler.hpp have a version for this team below.
struct Cluster {
    int rank, size;
    char* scratch;
    Block block;
    int index, blocks;  // which block of the cluster this is
    DrawScratch& exchange;
    int exchanges = 0, histograms = 0;  // how many there have been

    __device__ void barrier() { block.barrier(); }
    __device__ void add(uint64_t& to, uint64_t amount) { block.add(to, amount); }
    __device__ Lanes group(int n) { return {rank % n, n, rank / n, size / n}; }

    // Waits for all blocks. What they have written before is read behind it as volatile.
    __device__ void wait_for_blocks() {
        if (blocks == 1) return __syncthreads();
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    // The largest of all threads' values. Every call has a line of parts of its own: a block may
    // still read the last one.
    __device__ uint64_t max(uint64_t value) {
        value = block.max(value);
        if (blocks == 1) return value;
        volatile unsigned long long* parts = exchange.parts[exchanges++];
        if (block.rank == 0) parts[index] = value;
        wait_for_blocks();
        for (int b = 0; b < blocks; b++)
            if (parts[b] > value) value = parts[b];
        return value;
    }
};

// empty_bins (sampler.hpp) for this team: each block clears its own histogram.
__device__ uint64_t* empty_bins(Cluster& team) { return ::empty_bins(team.block); }

// find_bin (sampler.hpp) for this team: adds up the histograms of all blocks, then each block looks
// into the sum. There are three sums, which take turns: while blocks add to one, others may still
// read the one before, and the next is cleared.
template <class Need>
__device__ Found find_bin(Cluster& team, Need need_of) {
    uint64_t* bins = ((DrawMemory*)team.scratch)->bins;
    team.block.barrier();
    if (team.blocks > 1) {
        volatile unsigned long long* sum = team.exchange.sums[team.histograms++ % 3];
        volatile unsigned long long* next = team.exchange.sums[team.histograms % 3];
        for (int i = team.block.rank; i < kBins; i += kDrawThreads)
            if (bins[i] > 0) atomicAdd((unsigned long long*)&sum[i], bins[i]);
        for (int i = team.rank; i < kBins; i += team.size) next[i] = 0;
        team.wait_for_blocks();
        for (int i = team.block.rank; i < kBins; i += kDrawThreads) bins[i] = sum[i];
    }
    return find_bin(team.block, need_of);
}

// Writes ids into the list that hold the k likeliest; returns their number, which may be more than
// there is room for. largest: the largest key of this thread's logits.
__device__ int list_likeliest(Cluster& team, const float* logits, int V, uint64_t largest, int k) {
    // The k-th of the threads' largest logits in a block: k ids are as likely, so the k likeliest
    // of
    // all are, too. It is found bit by bit, as order_key has them.
    uint32_t least = 0, mine = uint32_t(largest >> 32);
    for (int bit = 31; bit >= 0; bit--)
        if (__syncthreads_count(mine >= (least | 1u << bit)) >= k) least |= 1u << bit;
    least = uint32_t(team.max(least));
    int end = mine >= least ? V : 0;  // a thread may have no such id
    visit(logits, team.rank, end, team.size, [&](int id, float logit) {
        if (order_key(logit, id) >> 32 < least) return;
        int at = atomicAdd(&team.exchange.count, 1);
        if (at < kDrawThreads) team.exchange.list[at] = id;
    });
    __threadfence();
    team.wait_for_blocks();
    __threadfence();
    return *(volatile int*)&team.exchange.count;
}

// What cut (sampler.hpp) does, for candidates of which each thread has one: the thread adds up what
// all before its own amount to. amount is 0 for those that are cut off already.
template <class Need>
__device__ void cut_listed(Candidates& c, uint64_t key, uint64_t amount, int count, Need need_of) {
    __shared__ uint64_t keys[kDrawThreads], amounts[kDrawThreads], least;
    int i = threadIdx.x;
    keys[i] = key, amounts[i] = amount;
    if (i == 0) least = c.least;
    __syncthreads();
    uint64_t before = 0, total = 0;
    for (int j = 0; j < count; j++) {
        total += amounts[j];
        if (keys[j] > key) before += amounts[j];
    }
    uint64_t need = need_of(total);
    if (before < need && need <= before + amount) least = key;
    __syncthreads();
    c.least = least;
}

// Draws from a list, by one block that has a thread for each of its ids.
__device__ int draw_listed(Block& block, Candidates c, const volatile int* list, int count,
                           const Sampling& s, int sample, int position) {
    __shared__ int ids[kDrawThreads], sorted[kDrawThreads];
    const int i = block.rank;
    const bool mine = i < count;  // this thread has an id
    if (mine) ids[i] = list[i];
    block.barrier();
    int place = 0;
    for (int j = 0; j < count && mine; j++) place += ids[j] < ids[i];
    if (mine) sorted[place] = ids[i];
    block.barrier();
    int id = mine ? sorted[i] : c.best;
    uint64_t key = mine ? order_key(c.logits[id], id) : 0;
    cut_listed(c, key, mine, count, [&](uint64_t) { return uint64_t(s.top_k); });
    if (s.top_p < 1)
        cut_listed(c, key, mine ? c.weight(id) : 0, count, [&](uint64_t total) {
            return uint64_t(ceil(double(s.top_p) * double(total)));
        });
    uint64_t weight = mine ? c.weight(id) : 0, total, before = block.before(weight, total);
    if (total == 0) return i ? -1 : c.best;  // the logits are not numbers
    uint64_t random = philox(s.seed, uint32_t(sample), uint32_t(position));
    auto number = uint64_t((unsigned __int128)random * total >> 64);
    return before <= number && number < before + weight ? id : -1;
}

// Draws by the list, if top-k is given and small and the list holds what it keeps. -2: it does not.
__device__ int draw_by_list(Cluster& team, const float* logits, int V, const Sampling& s,
                            int sample, int position) {
    if (s.temperature == 0 || s.top_k == 0 || s.top_k >= V || s.top_k > kListedTopK) return -2;
    uint64_t largest = 0;
    visit(logits, team.rank, V, team.size, [&](int id, float logit) {
        uint64_t key = order_key(logit, id);
        if (key > largest) largest = key;
    });
    int best = int(~uint32_t(team.max(largest)));
    int count = list_likeliest(team, logits, V, largest, s.top_k);
    if (count > kDrawThreads) return -2;
    if (team.index > 0) return -1;
    Candidates c = {logits, best, 0, 0, logits[best], 1 / double(s.temperature),
                    uint64_t(ceil(double(s.min_p) * 0x1p40))};
    return draw_listed(team.block, c, team.exchange.list, count, s, sample, position);
}

// Draws an id for each key from logits [rows, V], a cluster each, and writes it to drawn and to
// host, which the host can read.
__global__ void __launch_bounds__(kDrawThreads, 2)
draw_ids(const DrawKey* keys, DrawScratch* exchange, const float* logits, int V, int blocks,
         int* drawn, int* host) {
    __shared__ DrawMemory memory;
    wait_for_previous();
    int draw = blockIdx.x / blocks, index = blockIdx.x % blocks;
    char* scratch = (char*)&memory;
    Cluster team = {index * kDrawThreads + int(threadIdx.x), blocks * kDrawThreads, scratch,
                    Block(scratch), index, blocks, exchange[draw]};
    const DrawKey& key = keys[draw];
    const float* row = logits + size_t(key.row) * V;
    int id = draw_by_list(team, row, V, key.sampling, key.sample, key.position);
    if (id == -2) id = draw_id(team, row, V, key.sampling, key.sample, key.position);
    if (id >= 0) drawn[draw] = host[draw] = id;
    if (key.sampling.temperature == 0) return;
    team.wait_for_blocks();
    if (team.rank == 0) team.exchange.count = 0;
    for (auto& sum : team.exchange.sums)
        for (int i = team.rank; i < kBins && team.histograms > 0; i += team.size) sum[i] = 0;
}

template <class Base>
class FastDraw : public Base {
public:
    FastDraw(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values), on(this->switched_on("fast-draw", "", {"draw"}, "")) {
        if (!on) return;
        blocks = runs_hopper_code((const void*)draw_ids) ? kDrawBlocks : 1;
        scratch = this->template make<DrawScratch>(kDrawsAtOnce);
        check(cudaMemset(scratch, 0, kDrawsAtOnce * sizeof(DrawScratch)), "memory");
    }

protected:
    void draw(const DrawKey* keys, int count, int* drawn, int* host) override {
        if (!on) return Base::draw(keys, count, drawn, host);
        for (int i = 0; i < count; i += kDrawsAtOnce) {
            const int n = std::min(kDrawsAtOnce, count - i);
            this->start(draw_ids, dim3(n * blocks), kDrawThreads, 0, blocks, keys + i, scratch,
                        this->logits, this->c.vocab, blocks, drawn + i, host + i);
        }
    }

private:
    static constexpr int kDrawsAtOnce = 256;  // that there is scratch for
    const bool on;
    int blocks = 1;
    typename Base::template Array<DrawScratch> scratch;
};

}  // namespace cuda
