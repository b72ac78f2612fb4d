// sampler.hpp: from logits to the next id.
//
// Penalties; then the candidates in descending order of logit (lowest id first among equals) are
// cut by min-p, top-k and top-p, and one of those kept is drawn. Every cut keeps a beginning of
// that order, so all of them together are one threshold, and nothing is sorted.
// Weights are integers, round(2^40 exp((logit - max) / temperature)), by an exp of our own: sums of
// integers do not depend on their order, so any machine and any number of threads gives the same
// id for the same logits. Read nano.cu next.
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
#ifdef __CUDA_ARCH__
#define NANOCU_UNROLL _Pragma("unroll 8")
#else
#define NANOCU_UNROLL
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

// Descending order of logit, ascending of id, as one number; larger comes first. Logits are finite
// or -inf (NaN sorts last).
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
// The draw, written once for both builds. A team of threads works on it: one thread on a CPU, some
// thousand on a GPU, each with its rank. Nothing is sorted: what the cuts keep is a beginning of
// the order, found by a radix select, 11 bits of order_key at a time, by histograms.

constexpr int kBins = 2048;

// The bin where the sum of the bins from the highest down reaches a need: how much of the need is
// in it, and how much it has.
struct Found {
    int bin;
    uint64_t need, inside;
};

// The ids that may be drawn: those that min-p leaves, from a place in the order upwards.
struct Candidates {
    const float* logits;
    int V, best;
    double max, inverse;                // the logit of best; of the temperature
    uint64_t least_weight, least = 0;   // least: an order_key
    const int* list = nullptr;          // ids in order that hold all candidates; else all V
    int count = V;

    NANOCU_BOTH int id(int i) const { return list ? list[i] : i; }
    NANOCU_BOTH uint64_t weight(int id) const {
        if (order_key(logits[id], id) < least) return 0;
        uint64_t w = exp_weight((double(logits[id]) - max) * inverse);
        return w >= least_weight ? w : 0;
    }
};

struct OneThread {
    static constexpr int lanes = 1;  // threads of neighbouring ranks that read side by side
    int rank = 0, size = 1;
    uint64_t bins[kBins];

    uint64_t largest(uint64_t value) { return value; }  // of all threads' values
    uint64_t before(uint64_t value, uint64_t& total) {  // sum over lower ranks, over all
        total = value;
        return 0;
    }
    uint64_t before_in_lanes(uint64_t value, uint64_t& total) { return before(value, total); }
    void narrow(Candidates&, uint64_t, int) {}  // thousands find a list for top-k here,
    bool cut_list(Candidates&, const auto&, const auto&) { return false; }  // and go on with it
    void clear() { std::fill(bins, bins + kBins, 0); }
    void add(int bin, uint64_t amount) { bins[bin] += amount; }
    template <class Need>
    Found find(Need need_of) {  // from the sum over all bins
        uint64_t total = 0;
        for (uint64_t b : bins) total += b;
        Found f = {kBins - 1, need_of(total), 0};
        for (; f.bin > 0 && bins[f.bin] < f.need; f.bin--) f.need -= bins[f.bin];
        f.inside = bins[f.bin];
        return f;
    }
};

// Raises c.least until the sum over the ids left, of what amount gives for each, just reaches need.
template <class Team, class Amount, class Need>
NANOCU_BOTH void cut(Team& team, Candidates& c, Amount amount, Need need_of) {
    if (team.cut_list(c, amount, need_of)) return;
    uint64_t prefix = 0, need = 0;  // of the place in the order: the digits so far; still missing
    int digits_end = 64;
    while (digits_end > 0) {
        int end = digits_end > 11 ? digits_end - 11 : 0, digit = digits_end - end;
        team.clear();
        for (int i = team.rank; i < c.count; i += team.size) {
            int id = c.id(i);
            uint64_t key = order_key(c.logits[id], id);
            if (key < c.least || (digits_end < 64 && key >> digits_end != prefix)) continue;
            team.add(int(key >> end) & ((1 << digit) - 1), amount(id));
        }
        bool first = digits_end == 64;
        Found f = team.find([&](uint64_t total) { return first ? need_of(total) : need; });
        prefix = prefix << digit | uint64_t(f.bin);
        need = f.need;
        digits_end = end;
        if (need == f.inside) break;  // all that begin like this are needed
    }
    if (prefix << digits_end > c.least) c.least = prefix << digits_end;
}

// What the cuts of s leave of logits [V].
template <class Team>
NANOCU_BOTH Candidates candidates(Team& team, const float* logits, int V, const Sampling& s) {
    uint64_t largest = 0;
    NANOCU_UNROLL
    for (int id = team.rank; id < V; id += team.size) {
        uint64_t key = order_key(logits[id], id);
        if (key > largest) largest = key;
    }
    int best = int(~uint32_t(team.largest(largest)));
    auto least_weight = uint64_t(ceil(double(s.min_p) * 0x1p40));
    Candidates c = {logits, V, best, logits[best], 1 / double(s.temperature), least_weight};
    if (s.temperature > 0 && s.top_k > 0 && s.top_k < V) {
        team.narrow(c, largest, s.top_k);
        if (c.count != s.top_k)
            cut(team, c, [](int) { return 1; }, [&](uint64_t) { return uint64_t(s.top_k); });
    }
    if (s.temperature > 0 && s.top_p < 1)
        cut(team, c, [&](int id) { return c.weight(id); }, [&](uint64_t total) {
            return uint64_t(ceil(double(s.top_p) * double(total)));
        });
    return c;
}

// The next id for logits [V], penalties applied. sample and position number the draw. One thread of
// the team gets the id, the others -1.
template <class Team>
NANOCU_BOTH int draw_id(Team& team, const float* logits, int V, const Sampling& s, int sample,
                        int position) {
    Candidates c = candidates(team, logits, V, s);
    if (s.temperature == 0) return team.rank ? -1 : c.best;
    // every group of lanes has a range, in which its lanes take turns
    constexpr int lanes = Team::lanes;
    int groups = team.size / lanes, lane = team.rank % lanes;
    int each = (c.count + groups - 1) / groups;
    int begin = team.rank / lanes * each, end = begin + each < c.count ? begin + each : c.count;
    uint64_t sum = 0, of_group, total;
    NANOCU_UNROLL
    for (int i = begin + lane; i < end; i += lanes) sum += c.weight(c.id(i));
    uint64_t before = team.before(sum, total) - team.before_in_lanes(sum, of_group);
    if (total == 0) return team.rank ? -1 : c.best;  // the logits are not numbers
    // uniform in 0 .. total - 1; the id where it falls among the weights in the order of ids
    uint64_t random = philox(s.seed, uint32_t(sample), uint32_t(position));
    auto draw = uint64_t((unsigned __int128)random * total >> 64);
    if (draw < before || draw >= before + of_group) return -1;
    draw -= before;
    for (int i = begin + lane;; i += lanes) {
        uint64_t weight = i < end ? c.weight(c.id(i)) : 0, here;
        uint64_t low = team.before_in_lanes(weight, here);
        if (draw < here) return draw >= low && draw < low + weight ? c.id(i) : -1;
        draw -= here;
    }
}

inline int argmax(std::span<const float> logits) {
    OneThread team;
    return candidates(team, logits.data(), int(logits.size()), Sampling()).best;
}

inline int sample_id(std::span<const float> logits, const Sampling& s, int sample, int position) {
    OneThread team;
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
