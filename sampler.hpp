// sampler.hpp: from logits to the next id.
//
// In reading order:
//   Sampling      what a request may ask for, and its checks
//   exp_weight    the numbers that a draw is made of; penalties
//   teams         how an op is written once for CPUs and GPUs; nano.cu's ops are written so, too
//   draw_id       the draw, by a team
// The candidates are all ids in descending order of logit, the lowest id first among equals. min-p,
// top-k and top-p each keep a beginning of that order, so all of them together are one threshold,
// and nothing is sorted. One of the candidates that are kept is drawn.
// Weights are integers, round(2^40 exp((logit - max) / temperature)), by an exp of our own: a sum
// of integers does not depend on their order, so any machine and any number of threads draws the
// same id from the same logits. Read nano.cu next.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __CUDACC__
#define NANOCU_BOTH __host__ __device__  // the same code for a CPU and a GPU
#else
#define NANOCU_BOTH
#endif

struct Sampling {
    float temperature = 0;          // 0: the largest logit
    int top_k = 0;                  // keep the k likeliest; 0: all
    float top_p = 1;                // keep the fewest likeliest that together have probability p
    float min_p = 0;                // keep what has at least p times the largest probability
    float repetition_penalty = 1;   // over prompt and output; as in Keskar et al. 2019
    float presence_penalty = 0;     // over output, once for each id that is there
    float frequency_penalty = 0;    // over output, for each time it is there
    uint64_t seed = 0;

    // Throws std::invalid_argument with one line if a value is out of its range.
    void check() const {
        auto need = [](bool ok, const std::string& what, float value) {
            if (!ok) throw std::invalid_argument(what + ", not " + std::to_string(value));
        };
        need(temperature >= 0 && temperature <= 100, "temperature: 0 to 100", temperature);
        need(top_k >= 0, "top-k: 0 or more", float(top_k));
        need(top_p > 0 && top_p <= 1, "top-p: over 0, to 1", top_p);
        need(min_p >= 0 && min_p <= 1, "min-p: 0 to 1", min_p);
        float r = repetition_penalty, p = presence_penalty, f = frequency_penalty;
        need(r > 0 && r <= 100, "repetition-penalty: over 0, to 100", r);
        need(std::abs(p) <= 100, "presence-penalty: -100 to 100", p);
        need(std::abs(f) <= 100, "frequency-penalty: -100 to 100", f);
    }
    bool has_penalties() const {
        return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
    }
};

template <class To, class From>
NANOCU_BOTH To bits_as(From from) {  // std::bit_cast, also in kernels
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Philox4x32-10 (Salmon et al. 2011), a counter-based generator: the number for a (seed, sample,
// position) needs no state, so a request draws the same whatever runs beside it.
NANOCU_BOTH inline uint64_t philox(uint64_t seed, uint32_t sample, uint32_t position) {
    uint32_t c[4] = {position, sample, 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
        uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b),
                            uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
        for (int i = 0; i < 4; i++) c[i] = next[i];
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    return uint64_t(c[1]) << 32 | c[0];
}

// round(2^40 exp(x)) for x <= 0. Every operation is exact or correctly rounded, in this order, with
// no compiler's choice of contraction: the same bits everywhere.
NANOCU_BOTH inline uint64_t exp_weight(double x) {
    if (!(x > -28.5)) return 0;  // below half of 2^-40
    double n = rint(x * 1.4426950408889634);
    double r = fma(n, -1.9082149292705877e-10, fma(n, -0.6931471803691238, x)), e = 0;
    constexpr double factorials[] = {1,   1,    2,     6,      24,      120,
                                     720, 5040, 40320, 362880, 3628800, 39916800};
    for (int i = 11; i >= 0; i--) e = fma(e, r, 1 / factorials[i]);  // Taylor, |r| < 0.35
    return uint64_t(rint(e * bits_as<double>(uint64_t(1023 + 40 + int(n)) << 52)));
}

// The place in the order of candidates as one number: a larger logit has a larger key, and among
// equal logits the lower id has. Logits are finite or -inf; a NaN comes last.
NANOCU_BOTH inline uint64_t order_key(float logit, int id) {
    uint32_t bits = bits_as<uint32_t>(logit == 0 ? 0.0f : logit);  // -0 equals 0
    bits = std::isnan(logit) ? 0 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return uint64_t(bits) << 32 | uint32_t(~id);
}

// The ids that are in prompt or output, with how often they are in output.
inline std::unordered_map<int, int> count_ids(std::span<const int> prompt,
                                              std::span<const int> output) {
    std::unordered_map<int, int> count;
    for (int id : prompt) count[id];
    for (int id : output) count[id]++;
    return count;
}

// count: how often the id of this logit is in the output.
NANOCU_BOTH inline void penalize(float& logit, const Sampling& s, int count) {
    logit = logit > 0 ? logit / s.repetition_penalty : logit * s.repetition_penalty;
    logit = fmaf(-s.frequency_penalty, float(count), logit) - (count ? s.presence_penalty : 0);
}

// Changes logits [V] in place. prompt, output: the ids so far.
inline void apply_penalties(std::span<float> logits, const Sampling& s, std::span<const int> prompt,
                            std::span<const int> output) {
    for (auto [id, n] : count_ids(prompt, output)) penalize(logits[id], s, n);
}

// ---------------------------------------------------------------------------------------------
// Teams. An op is a function template over the team of threads that works on it together: one
// thread on a CPU, a thread block on a GPU. All threads run the same lines, and each finds its
// share of the work by its rank. A team offers:
//
//   rank, size   which thread of the team this is, and how many there are
//   scratch      memory that the whole team sees, 16-byte aligned
//   barrier()    nobody goes on before all have come here; then all see what each of them wrote
//   sum, max     of the values of all threads; every thread gets the result
//   before       the sum of the values of lower ranks, and of all (total); for integers
//   group(n)     the team in groups of n threads of neighbouring ranks, called lanes; n is a power
//                of two, 32 at most. Its rank, size, sum and max are those in the group, and it is
//                group index of count. A team of one thread is its own group
//   add          adds to a number in scratch while others add to it, too
//
// All threads of a team have to come to every barrier, sum, max, before and group. A sum, max or
// before of the team is a barrier, too; one of a group is none.

struct OneThread {
    static constexpr int rank = 0, size = 1, index = 0, count = 1;
    char* scratch;

    explicit OneThread(char* scratch = nullptr) : scratch(scratch) {}
    void barrier() {}
    template <class T> T sum(T value) { return value; }
    template <class T> T max(T value) { return value; }
    uint64_t before(uint64_t value, uint64_t& total) {
        total = value;
        return 0;
    }
    OneThread group(int) { return *this; }
    void add(uint64_t& to, uint64_t amount) { to += amount; }
};

#ifdef __CUDACC__
// Lanes of a warp, which exchange values without memory. For a sum or max, lanes whose ranks differ
// in one bit give each other what they have; after the last bit each has the result.
struct Lanes {
    int rank, size, index, count;

    template <class T> __device__ T sum(T value) {
        for (int bit = size / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
        return value;
    }
    template <class T> __device__ T max(T value) {
        for (int bit = size / 2; bit > 0; bit /= 2) {
            T other = __shfl_xor_sync(~0u, value, bit);
            if (other > value) value = other;
        }
        return value;
    }
    __device__ uint64_t before(uint64_t value, uint64_t& total) {
        uint64_t sum = value;  // of this lane, and of 1, 3, 7, 15, 31 before it
        for (int n = 1; n < size; n *= 2) {
            uint64_t other = __shfl_up_sync(~0u, sum, n, size);
            if (rank >= n) sum += other;
        }
        total = __shfl_sync(~0u, sum, size - 1, size);
        return sum - value;
    }
};

// A thread block, made of whole warps.
struct Block {
    int rank = int(threadIdx.x), size = int(blockDim.x);
    char* scratch;  // in shared memory

    __device__ explicit Block(char* scratch) : scratch(scratch) {}
    __device__ void barrier() { __syncthreads(); }
    __device__ Lanes group(int n) { return {rank % n, n, rank / n, size / n}; }
    template <class T> __device__ T sum(T value) {
        return group(32).sum(of_warps(group(32).sum(value), T(0)));
    }
    template <class T> __device__ T max(T value) {
        value = group(32).max(value);
        return group(32).max(of_warps(value, value));
    }
    __device__ uint64_t before(uint64_t value, uint64_t& total) {
        uint64_t of_warp, in_warp = group(32).before(value, of_warp);
        uint64_t before_warps = group(32).before(of_warps(of_warp, uint64_t(0)), total);
        return in_warp + __shfl_sync(~0u, before_warps, rank / 32);
    }
    // The hardware adds 32 bits at once but 64 in a loop of attempts, which takes long where many
    // threads meet. So the lower half is added first, then the upper one with the carry.
    __device__ void add(uint64_t& to, uint64_t amount) {
        auto halves = (unsigned*)&to;
        unsigned low = unsigned(amount), old = atomicAdd(&halves[0], low);
        unsigned high = unsigned(amount >> 32) + (old + low < low);
        if (high > 0) atomicAdd(&halves[1], high);
    }

private:
    // Lane i of every warp gets the value of warp i, or `none` if there is no such warp.
    template <class T> __device__ T of_warps(T value, T none) {
        __shared__ T values[32];
        if (rank % 32 == 0) values[rank / 32] = value;
        __syncthreads();
        T out = rank % 32 < size / 32 ? values[rank % 32] : none;
        __syncthreads();
        return out;
    }
};
#endif

// ---------------------------------------------------------------------------------------------
// The draw. Where a cut ends is found by a radix select on order_key: 11 bits at a time, from the
// highest down, a histogram tells which value these bits have there.

constexpr int kBins = 2048;  // of a histogram
constexpr int kParts = 256;  // into which ids are cut in search of the one that is drawn

// Where the sum of a histogram's bins, added up from the highest down, reaches what is needed.
struct Found {
    int bin;
    uint64_t need;    // how much of this bin is still needed
    uint64_t inside;  // how much this bin has
};

// What a draw keeps in the team's scratch.
struct DrawMemory {
    uint64_t bins[kBins];
    Found found;
};
constexpr int kDrawScratch = sizeof(DrawMemory);

// The ids that may be drawn: neither their order_key nor their weight is below the least.
struct Candidates {
    const float* logits;
    int best, first, end;  // the first candidate; this thread looks after first, first + size, ...
    double max, inverse;   // the logit of best; 1 / temperature
    uint64_t least_weight, least = 0;  // from min-p; from top-k and top-p

    NANOCU_BOTH uint64_t weight(int id) const { return weight(id, logits[id]); }
    NANOCU_BOTH uint64_t weight(int id, float logit) const {
        if (order_key(logit, id) < least) return 0;
        uint64_t w = exp_weight((double(logit) - max) * inverse);
        return w >= least_weight ? w : 0;
    }
};

// Calls use(id, logit) for begin, begin + stride, ... before end.
template <class Use>
NANOCU_BOTH void visit(const float* logits, int begin, int end, int stride, Use use) {
#ifdef __CUDA_ARCH__  // memory takes long to answer, so eight logits are asked for at a time
    constexpr int batch = 8;
    for (int id = begin; id < end; id += batch * stride) {
        float values[batch];
        #pragma unroll
        for (int i = 0; i < batch; i++)
            values[i] = id + i * stride < end ? logits[id + i * stride] : 0;
        #pragma unroll
        for (int i = 0; i < batch; i++)
            if (id + i * stride < end) use(id + i * stride, values[i]);
    }
#else
    for (int id = begin; id < end; id += stride) use(id, logits[id]);
#endif
}

// Clears the team's histogram.
template <class Team>
NANOCU_BOTH uint64_t* empty_bins(Team& team) {
    uint64_t* bins = ((DrawMemory*)team.scratch)->bins;
    for (int i = team.rank; i < kBins; i += team.size) bins[i] = 0;
    team.barrier();
    return bins;
}

// need_of(total of all bins) is what is needed. Each thread looks through some neighbouring bins.
template <class Team, class Need>
NANOCU_BOTH Found find_bin(Team& team, Need need_of) {
    auto& [bins, found] = *(DrawMemory*)team.scratch;
    team.barrier();
    int each = (kBins + team.size - 1) / team.size, bin = kBins - 1 - each * team.rank;
    uint64_t sum = 0, total;
    for (int i = 0; i < each && i <= bin; i++) sum += bins[bin - i];
    if (team.rank == 0) found = {kBins - 1, 0, 0};  // stays if the need is 0 or more than there is
    uint64_t before = team.before(sum, total), need = need_of(total);
    if (before < need && need <= before + sum) {
        for (; before + bins[bin] < need; bin--) before += bins[bin];
        found = {bin, need - before, bins[bin]};
    }
    team.barrier();
    return found;
}

// Raises c.least as far as it goes while the candidates that are left still add up to
// need_of(total). What is added up is amount(id, logit) of each; total is the sum over all of them.
template <class Team, class Amount, class Need>
NANOCU_BOTH void cut(Team& team, Candidates& c, Amount amount, Need need_of) {
    uint64_t last_key = 0, known = 0;  // of the last candidate left; which of its bits are known
    Found found = {0, 0, 1};
    for (int low = 64; low > 0 && found.need != found.inside;) {
        int bits = low < 11 ? low : 11, first = c.end, end = 0;
        low -= bits;
        uint64_t* bins = empty_bins(team);
        visit(c.logits, c.first, c.end, team.size, [&](int id, float logit) {
            uint64_t key = order_key(logit, id);
            if (key < c.least) return;
            if (end == 0) first = id;
            end = id + 1;
            if ((key & known) != last_key) return;
            team.add(bins[key >> low & ((1 << bits) - 1)], amount(id, logit));
        });
        c.first = first, c.end = end;  // so what is cut off at both ends is not read again
        found = find_bin(team, [&](uint64_t total) { return known ? found.need : need_of(total); });
        last_key |= uint64_t(found.bin) << low;
        known = ~uint64_t(0) << low;
        if (last_key > c.least) c.least = last_key;
    }
}

// What the cuts of s leave of logits [V].
template <class Team>
NANOCU_BOTH Candidates candidates(Team& team, const float* logits, int V, const Sampling& s) {
    uint64_t largest = 0;  // of this thread's keys
    visit(logits, team.rank, V, team.size, [&](int id, float logit) {
        uint64_t key = order_key(logit, id);
        if (key > largest) largest = key;
    });
    int best = int(~uint32_t(team.max(largest)));
    Candidates c = {logits, best, team.rank, V, logits[best], 1 / double(s.temperature),
                    uint64_t(ceil(double(s.min_p) * 0x1p40))};
    if (s.temperature > 0 && s.top_k > 0 && s.top_k < V) {
        // The threads' largest keys are size keys, so the k-th of all keys, for k up to size, is
        // not below the lowest of them. This spares counting most ids.
        if (s.top_k <= team.size) c.least = ~team.max(~largest);
        auto one = [](int, float) { return 1; };
        cut(team, c, one, [&](uint64_t) { return uint64_t(s.top_k); });
    }
    if (s.temperature > 0 && s.top_p < 1)
        cut(team, c, [&](int id, float l) { return c.weight(id, l); }, [&](uint64_t total) {
            return uint64_t(ceil(double(s.top_p) * double(total)));
        });
    return c;
}

// The next id for logits [V], penalties applied; team.scratch has kDrawScratch bytes. sample and
// position number the draw. One thread of the team gets the id, the others -1.
template <class Team>
NANOCU_BOTH int draw_id(Team& team, const float* logits, int V, const Sampling& s, int sample,
                        int position) {
    Candidates c = candidates(team, logits, V, s);
    if (s.temperature == 0) return team.rank ? -1 : c.best;
    // A random number below the total weight falls, in the order of ids, into the weight of one of
    // them. To find it, the ids are cut into parts, and the part where it falls is cut again.
    uint64_t random = philox(s.seed, uint32_t(sample), uint32_t(position));
    auto group = team.group(32);  // its lanes read a part side by side
    Found found = {0, 0, 0};
    for (int begin = 0, end = V, each = 0;;) {
        each = (end - begin + kParts - 1) / kParts;
        uint64_t* bins = empty_bins(team);
        for (int part = group.index; part < kParts; part += group.count) {
            int from = begin + part * each, to = from + each < end ? from + each : end;
            uint64_t sum = 0;
            visit(logits, from + group.rank, to, group.size, [&](int id, float logit) {
                sum += c.weight(id, logit);
            });
            sum = group.sum(sum);
            if (group.rank == 0) bins[kBins - 1 - part] = sum;  // the lowest ids in the highest bin
        }
        found = find_bin(team, [&](uint64_t total) {
            auto number = uint64_t((unsigned __int128)random * total >> 64);  // 0 .. total - 1
            return end - begin == V ? number + 1 : found.need;
        });
        if (found.inside == 0) return team.rank ? -1 : c.best;  // the logits are not numbers
        begin += each * (kBins - 1 - found.bin);
        end = begin + each < end ? begin + each : end;
        if (each == 1) return team.rank ? -1 : begin;
    }
}

inline int argmax(std::span<const float> logits) {
    OneThread team;  // without scratch, which the largest logit does not take
    return candidates(team, logits.data(), int(logits.size()), Sampling()).best;
}

inline int sample_id(std::span<const float> logits, const Sampling& s, int sample, int position) {
    alignas(16) char scratch[kDrawScratch];
    OneThread team(scratch);
    return draw_id(team, logits.data(), int(logits.size()), s, sample, position);
}

struct TokenLogprob {
    int id;
    double logprob;  // natural logarithm
};

// The log-probability of id under softmax(logits), then those of the k likeliest ids.
inline std::vector<TokenLogprob> log_probabilities(std::span<const float> logits, int id, int k) {
    double max = logits[argmax(logits)], sum = 0;
    for (float logit : logits) sum += std::exp(logit - max);
    auto of = [&](int i) { return TokenLogprob{i, logits[i] - max - std::log(sum)}; };
    std::vector<TokenLogprob> out = {of(id)};
    if (k == 0) return out;
    std::vector<uint64_t> keys;
    for (int i = 0; i < int(logits.size()); i++) keys.push_back(order_key(logits[i], i));
    k = std::min<int>(k, int(keys.size()));
    std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<>{});
    for (int i = 0; i < k; i++) out.push_back(of(int(~uint32_t(keys[i]))));
    return out;
}
