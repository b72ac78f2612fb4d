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
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

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

// Philox4x32-10 (Salmon et al. 2011), a counter-based generator: the number for a (seed, sample,
// position) needs no state, so a request draws the same whatever runs beside it.
inline uint64_t philox(uint64_t seed, uint32_t sample, uint32_t position) {
    uint32_t c[4] = {position, sample, 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
        uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b),
                            uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    return uint64_t(c[1]) << 32 | c[0];
}

// round(2^40 exp(x)) for x <= 0. Every operation is exact or correctly rounded, in this order, with
// no compiler's choice of contraction: the same bits everywhere.
inline uint64_t exp_weight(double x) {
    if (!(x > -28.5)) return 0;  // below half of 2^-40
    double n = std::rint(x * 1.4426950408889634);
    double r = std::fma(n, -1.9082149292705877e-10, std::fma(n, -0.6931471803691238, x)), e = 0;
    constexpr double factorials[] = {1,   1,    2,     6,      24,      120,
                                     720, 5040, 40320, 362880, 3628800, 39916800};
    for (int i = 11; i >= 0; i--) e = std::fma(e, r, 1 / factorials[i]);  // Taylor, |r| < 0.35
    return uint64_t(std::rint(e * std::bit_cast<double>(uint64_t(1023 + 40 + int(n)) << 52)));
}

// Descending order of logit, ascending of id, as one number; larger comes first. Logits are finite
// or -inf (NaN sorts last).
inline uint64_t order_key(float logit, int id) {
    uint32_t bits = std::bit_cast<uint32_t>(logit == 0 ? 0.0f : logit);  // -0 equals 0
    bits = std::isnan(logit) ? 0 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return uint64_t(bits) << 32 | uint32_t(~id);
}

inline int argmax(std::span<const float> logits) {
    uint64_t best = 0;
    for (int id = 0; id < int(logits.size()); id++)
        best = std::max(best, order_key(logits[id], id));
    return int(~uint32_t(best));
}

// Changes logits [V] in place. prompt, output: the ids so far.
inline void apply_penalties(std::span<float> logits, const Sampling& s, std::span<const int> prompt,
                            std::span<const int> output) {
    std::unordered_map<int, int> count;  // in output
    for (int id : prompt) count[id];
    for (int id : output) count[id]++;
    for (auto [id, n] : count) {
        float& logit = logits[id];
        logit = logit > 0 ? logit / s.repetition_penalty : logit * s.repetition_penalty;
        logit = std::fma(-s.frequency_penalty, float(n), logit) - (n ? s.presence_penalty : 0);
    }
}

// The candidates that min-p, top-k and top-p keep are those with order_key >= the result.
inline uint64_t threshold(std::span<const float> logits, const Sampling& s, float max) {
    struct Candidate {
        uint64_t key, weight;
        bool operator<(const Candidate& b) const { return key > b.key; }
    };
    if (s.top_k == 0 && s.top_p == 1 && s.min_p == 0) return 0;
    uint64_t least = uint64_t(std::ceil(double(s.min_p) * 0x1p40));
    std::vector<Candidate> kept;
    for (int id = 0; id < int(logits.size()); id++)
        kept.push_back({order_key(logits[id], id), 0});
    auto at = kept.begin(), end = kept.end();  // what is still undecided
    if (s.top_k > 0 && s.top_k < int(kept.size())) {
        std::nth_element(at, at + s.top_k, end);
        end = at + s.top_k;
    }
    uint64_t total = 0;
    for (auto c = at; c != end; c++)
        c->weight = exp_weight((double(logits[uint32_t(~c->key)]) - max) / s.temperature);
    end = std::partition(at, end, [&](const Candidate& c) { return c.weight >= least; });
    for (auto c = at; c != end; c++) total += c->weight;
    if (total == 0) return 0;  // the logits are not numbers
    // the smallest beginning with at least top_p of the total: go on in the half where it ends
    if (s.top_p == 1) return std::max_element(at, end)->key;
    uint64_t missing = uint64_t(std::ceil(double(s.top_p) * double(total)));
    while (end - at > 1) {
        auto middle = at + (end - at) / 2;
        std::nth_element(at, middle, end);
        uint64_t upper = 0;
        for (auto c = at; c != middle; c++) upper += c->weight;
        if (upper >= missing) {
            end = middle;
        } else {
            missing -= upper;
            at = middle;
        }
    }
    return at->key;
}

// The next id for logits [V], penalties applied. sample and position number the draw.
inline int sample_id(std::span<const float> logits, const Sampling& s, int sample, int position) {
    int best = argmax(logits);
    if (s.temperature == 0) return best;
    uint64_t least = threshold(logits, s, logits[best]), total = 0;
    std::vector<uint64_t> weights(logits.size());
    for (int id = 0; id < int(logits.size()); id++)
        if (order_key(logits[id], id) >= least)
            total += weights[id] = exp_weight((double(logits[id]) - logits[best]) / s.temperature);
    unsigned __int128 random = philox(s.seed, uint32_t(sample), uint32_t(position));
    uint64_t draw = uint64_t(random * total >> 64);  // uniform in 0 .. total - 1
    for (int id = 0; id < int(logits.size()); id++) {
        if (draw < weights[id]) return id;
        draw -= weights[id];
    }
    return best;  // total is 0 only if the logits are not numbers
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
