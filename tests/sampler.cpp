// The sampler against brute force, exact distributions, published vectors and hand-computed values.
#include "common.hpp"

namespace {

Sampling cuts(int top_k, float top_p, float min_p, float temperature = 1) {
    Sampling s;
    s.temperature = temperature;
    s.top_k = top_k, s.top_p = top_p, s.min_p = min_p;
    return s;
}

// Logits of many kinds: smooth, with ties, with -inf, equal, far apart, at the ends of float.
std::vector<float> random_logits(std::mt19937& random, int kind) {
    const int sizes[] = {1, 2, 3, 10, 64, 257, 1000, 4099};
    std::vector<float> logits(sizes[random() % 8]);
    std::normal_distribution<float> normal;
    const float ends[] = {FLT_MAX, -FLT_MAX, 0.0f, -0.0f, FLT_MIN, -1e30f, -INFINITY};
    for (float& logit : logits) {
        logit = normal(random) * 3;
        if (kind == 1) logit = std::round(logit);                     // ties
        if (kind == 2) logit = random() % 4 ? -INFINITY : logit;      // most are impossible
        if (kind == 3) logit = 1.5f;                                  // all equal
        if (kind == 4) logit *= 1000;                                 // almost all weight in one
        if (kind == 5) logit = ends[random() % 7];
        if (kind == 6) logit = random() % 2 ? 0.0f : -0.0f;           // these are equal too
    }
    if (std::ranges::max(logits) == -INFINITY) logits[random() % logits.size()] = 1;
    return logits;
}

// Ids in the order of the cuts: by logit, among equals by id.
std::vector<int> sorted_ids(const std::vector<float>& logits) {
    std::vector<int> ids(logits.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::ranges::stable_sort(ids, [&](int a, int b) { return logits[a] > logits[b]; });
    return ids;
}

// What is kept of sorted ids, cut by cut as the header says, in exact arithmetic: min_p (24 bits)
// times 2^40 is exact in a double, top_p and the sums are integers here. The sampler itself rounds
// top_p * total to a double, so it could differ where a sum is within one of the border, which is
// 2^-40 of the largest weight; where that is likely, with equal weights, its product is exact.
std::vector<int> brute_force(const std::vector<float>& logits, std::vector<int> ids,
                             const Sampling& s) {
    auto weight = [&](int id) {
        return exp_weight((double(logits[id]) - logits[ids[0]]) / s.temperature);
    };
    std::vector<int> kept;
    for (int id : ids) if (double(weight(id)) >= double(s.min_p) * 0x1p40) kept.push_back(id);
    if (s.top_k && s.top_k < int(kept.size())) kept.resize(s.top_k);
    if (s.top_p == 1) return kept;
    unsigned __int128 total = 0, sum = 0, p = uint64_t(double(s.top_p) * 0x1p44);
    REQUIRE(double(p) == double(s.top_p) * 0x1p44);
    for (int id : kept) total += weight(id);
    for (size_t i = 0; i < kept.size(); i++)
        if ((sum += weight(kept[i])) << 44 >= p * total) kept.resize(i + 1);
    return kept;
}

// Philox4x32-10 as in the paper: all four words of the counter.
std::array<uint32_t, 4> philox_reference(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        c = {uint32_t(p1 >> 32) ^ c[1] ^ key[0], uint32_t(p1),
             uint32_t(p0 >> 32) ^ c[3] ^ key[1], uint32_t(p0)};
        key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
    }
    return c;
}

// Pearson's statistic of counts against probabilities, as the normal deviate that it corresponds to
// (Wilson and Hilferty 1931). Ids that are expected less than 5 times count as one.
double deviate(const std::vector<int>& counts, const std::vector<double>& probabilities,
               int draws) {
    double statistic = 0, rare = 0, rare_count = 0;
    int cells = 0;
    auto add = [&](double expected, double count) {
        statistic += (count - expected) * (count - expected) / expected;
        cells++;
    };
    for (size_t i = 0; i < counts.size(); i++) {
        double expected = probabilities[i] * draws;
        if (expected >= 5) add(expected, counts[i]);
        else rare += expected, rare_count += counts[i];
    }
    if (rare >= 1) add(rare, rare_count);
    double df = cells - 1;
    return (std::cbrt(statistic / df) - 1 + 2 / (9 * df)) / std::sqrt(2 / (9 * df));
}

}  // namespace

// Which ids the cuts of s leave, in this order.
static std::vector<int> kept_of(const std::vector<float>& logits, const std::vector<int>& order,
                                const Sampling& s) {
    alignas(16) char scratch[kDrawScratch];
    OneThread team(scratch);
    Candidates c = candidates(team, logits.data(), int(logits.size()), s);
    std::vector<int> kept;
    for (int id : order) {
        uint64_t weight = exp_weight((double(logits[id]) - c.max) * c.inverse);
        if (order_key(logits[id], id) >= c.least && weight >= c.least_weight) kept.push_back(id);
    }
    return kept;
}

TEST_CASE("what top-k, top-p, min-p and their combinations keep equals a brute-force computation") {
    std::mt19937 random(1);
    int cut_at_all = 0;
    for (int i = 0; i < 1000; i++) {
        std::vector<float> logits = random_logits(random, i % 7);
        std::vector<int> order = sorted_ids(logits);
        int k = 1 + int(random() % (random() % 2 ? 10 : logits.size() + 2));
        float p = random() % 4 ? std::max(0.001f, float(random() % 1000) / 1000) : 0.5f;
        float m = random() % 4 ? float(random() % 1000) / 1000 : 1;
        if (random() % 2) m *= 0.01f;
        float temperature = std::array{0.01f, 0.7f, 1.0f, 5.0f}[random() % 4];
        CHECK(kept_of(logits, order, cuts(0, 1, 0, temperature)) == order);
        for (int use = 0; use < 8; use++) {
            Sampling s = cuts(use & 1 ? k : 0, use & 2 ? p : 1, use & 4 ? m : 0, temperature);
            std::vector<int> want = brute_force(logits, order, s);
            std::vector<int> got = kept_of(logits, order, s);
            CAPTURE(i);
            CAPTURE(use);
            CHECK(got == want);
            cut_at_all += want.size() < logits.size();
            int id = sample_id(logits, s, 0, i);
            CHECK(std::ranges::count(want, id) == 1);
        }
    }
    CHECK(cut_at_all > 5000);
}

TEST_CASE("a cut keeps at least one id, and ties end in the lowest ids") {
    std::vector<float> logits = {1, 2, 2, 2, 2, 0};
    auto kept = [&](const Sampling& s) {
        std::vector<int> ids = kept_of(logits, {1, 2, 3, 4, 0, 5}, s);
        std::ranges::sort(ids);
        return ids;
    };
    CHECK(kept(cuts(1, 1, 0)) == std::vector{1});
    CHECK(kept(cuts(2, 1, 0)) == std::vector{1, 2});
    CHECK(kept(cuts(5, 1, 0)) == std::vector{0, 1, 2, 3, 4});
    CHECK(kept(cuts(100, 1, 0)).size() == 6);
    CHECK(kept(cuts(0, 1e-6f, 0)) == std::vector{1});
    CHECK(kept(cuts(4, 0.5f, 0)) == std::vector{1, 2});  // exactly half of the four
    CHECK(kept(cuts(4, 0.500001f, 0)) == std::vector{1, 2, 3});
    CHECK(kept(cuts(0, 1, 1)) == std::vector{1, 2, 3, 4});  // as likely as the likeliest
    CHECK(kept(cuts(0, 1, 0.3f)) == std::vector{0, 1, 2, 3, 4});  // exp(-1) is 0.37, exp(-2) 0.14
    CHECK(kept(cuts(0, 1, 0.3f, 0.5f)) == std::vector{1, 2, 3, 4});  // 0.14 and 0.02 now
    CHECK(kept(cuts(3, 0.5f, 0.3f)) == std::vector{1, 2});
}

TEST_CASE("order_key sorts by logit, then by id; -0 is 0, -inf is above NaN") {
    std::mt19937 random(2);
    for (int i = 0; i < 70; i++) {
        std::vector<float> logits = random_logits(random, i % 7);
        std::vector<int> by_key(logits.size());
        std::iota(by_key.begin(), by_key.end(), 0);
        auto key = [&](int id) { return order_key(logits[id], id); };
        std::ranges::sort(by_key, std::greater{}, key);
        CHECK(by_key == sorted_ids(logits));
        CHECK(argmax(logits) == by_key[0]);
    }
    CHECK(order_key(0.0f, 3) == order_key(-0.0f, 3));
    CHECK(order_key(-INFINITY, 1000000) > order_key(NAN, 0));
    CHECK(order_key(-INFINITY, 1000000) > order_key(-NAN, 0));
}

TEST_CASE("draws follow the exact distribution, with and without cuts: chi-square of 100,000") {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> logits(60);
    for (float& logit : logits) logit = 2 * normal(random);
    logits[7] = -INFINITY;
    logits[20] = logits[21] = logits[22];
    double largest = *std::ranges::max_element(logits);
    const int draws = 100'000;
    for (Sampling s : {cuts(0, 1, 0), cuts(0, 1, 0, 0.7f), cuts(20, 1, 0), cuts(0, 0.9f, 0),
                       cuts(0, 1, 0.05f), cuts(25, 0.95f, 0.02f, 1.3f)}) {
        std::vector<double> exact(logits.size());
        double sum = 0;
        for (int id : brute_force(logits, sorted_ids(logits), s))
            sum += exact[id] = std::exp((logits[id] - largest) / s.temperature);
        for (double& p : exact) p /= sum;
        // what changes from draw to draw: the position; without cuts also the sample, the seed
        bool cut = s.top_k || s.top_p < 1 || s.min_p > 0;
        for (int vary = 0; vary < (cut ? 1 : 3); vary++) {
            std::vector<int> counts(logits.size());
            for (int i = 0; i < draws; i++) {
                s.seed = vary == 2 ? i * 0x123456789ull : 42;
                counts[sample_id(logits, s, vary == 1 ? i : 0, vary == 0 ? i : 7)]++;
            }
            for (size_t i = 0; i < counts.size(); i++) if (exact[i] == 0) CHECK(counts[i] == 0);
            // one in 1,000 would be outside on each side; the seeds are fixed, and these are inside
            CHECK(std::abs(deviate(counts, exact, draws)) < 3.09);
        }
    }
}

TEST_CASE("the seed, the sample and the position decide a draw, and each of them matters") {
    std::vector<float> logits(1000);
    auto ids = [&](uint64_t seed, int sample, int position) {
        Sampling s = cuts(0, 1, 0);
        s.seed = seed;
        std::vector<int> out;
        for (int i = 0; i < 10; i++) out.push_back(sample_id(logits, s, sample, position + i));
        return out;
    };
    const std::vector<int> first = ids(1, 0, 0);
    CHECK(ids(1, 0, 0) == first);
    CHECK(ids(2, 0, 0) != first);
    CHECK(ids(1 + (1ull << 32), 0, 0) != first);  // all 64 bits of the seed count
    CHECK(ids(1, 1, 0) != first);
    CHECK(ids(1, 0, 100) != first);
    CHECK(ids(0, 1, 0) != first);
    std::vector<int> later = ids(1, 0, 1);
    CHECK(std::equal(first.begin() + 1, first.end(), later.begin()));
}

TEST_CASE("temperature 0 takes the largest logit, the lowest id among equals") {
    std::vector<float> logits = {1, 5, -3, 5, 5};
    for (int i = 0; i < 20; i++) CHECK(sample_id(logits, cuts(0, 1, 0, 0), i, i) == 1);
    CHECK(argmax(std::vector{-0.0f, 0.0f}) == 0);
    CHECK(argmax(std::vector{-INFINITY, -INFINITY}) == 0);
    CHECK(argmax(std::vector{NAN, -INFINITY, -1e30f}) == 2);
    // broken logits still give an id
    for (float broken : {NAN, INFINITY, -INFINITY}) {
        std::vector<float> all(5, broken);
        for (float t : {0.0f, 1.0f})
            for (Sampling s : {cuts(0, 1, 0, t), cuts(2, 0.5f, 0.5f, t)}) {
                int id = sample_id(all, s, 0, 0);
                CHECK(id >= 0);
                CHECK(id < 5);
            }
    }
}

TEST_CASE("exp_weight is 2^40 exp(x), rounded, and never grows as x falls") {
    CHECK(exp_weight(0) == uint64_t(1) << 40);
    CHECK(exp_weight(-0.0) == uint64_t(1) << 40);
    CHECK(exp_weight(-INFINITY) == 0);
    CHECK(exp_weight(NAN) == 0);
    CHECK(exp_weight(-1e300) == 0);
    int off = 0, grows = 0;
    uint64_t last = exp_weight(0);
    for (int i = 0; i <= 300'000; i++) {
        double x = -i * 1e-4;
        uint64_t w = exp_weight(x);
        // half of one from rounding, and 2^-6 for the polynomial
        off += std::abs((long double)w - std::exp((long double)x) * 0x1p40L) > 0.5L + 0x1p-6L;
        grows += w > last;
        last = w;
    }
    CHECK(off == 0);
    // where one polynomial takes over from the next, in steps of the last bit of x
    for (int n = 0; n < 41; n++) {
        double x = -(n + 0.5) * std::log(2.0);
        for (int i = 0; i < 2000; i++) x = std::nextafter(x, 0);
        last = exp_weight(x);
        for (int i = 0; i < 4000; i++) {
            uint64_t w = exp_weight(x = std::nextafter(x, -100));
            grows += w > last;
            last = w;
        }
    }
    CHECK(grows == 0);
}

TEST_CASE("philox is Philox4x32-10") {
    // the known answers of Random123's kat_vectors
    using Four = std::array<uint32_t, 4>;
    CHECK(philox_reference({0, 0, 0, 0}, {0, 0}) ==
          Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    CHECK(philox_reference({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) ==
          Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    CHECK(philox_reference({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                           {0xa4093822, 0x299f31d0}) ==
          Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
    CHECK(philox(0, 0, 0) == 0xe169c58d6627e8d5);
    std::mt19937_64 random(4);
    for (int i = 0; i < 1000; i++) {
        uint64_t seed = random();
        uint32_t sample = uint32_t(random()), position = uint32_t(random());
        Four c = philox_reference({position, sample, 0, 0}, {uint32_t(seed), uint32_t(seed >> 32)});
        CHECK(philox(seed, sample, position) == (uint64_t(c[1]) << 32 | c[0]));
    }
}

TEST_CASE("penalties: repetition over prompt and output, presence and frequency over output") {
    const std::vector<int> prompt = {0, 1, 1}, output = {1, 3, 3, 3, 4};
    auto changed = [&](float repetition, float presence, float frequency) {
        Sampling s;
        s.repetition_penalty = repetition;
        s.presence_penalty = presence;
        s.frequency_penalty = frequency;
        CHECK(s.has_penalties() == (repetition != 1 || presence || frequency));
        std::vector<float> logits = {2, -1, 0.5f, 3, 0, -2};
        apply_penalties(logits, s, prompt, output);
        return logits;
    };
    using F = std::vector<float>;
    CHECK(changed(1, 0, 0) == F{2, -1, 0.5f, 3, 0, -2});
    CHECK(changed(2, 0, 0) == F{1, -2, 0.5f, 1.5f, 0, -2});  // once, however often it is there
    CHECK(changed(0.5f, 0, 0) == F{4, -0.5f, 0.5f, 6, 0, -2});
    CHECK(changed(1, 0.5f, 0) == F{2, -1.5f, 0.5f, 2.5f, -0.5f, -2});
    CHECK(changed(1, 0, 0.25f) == F{2, -1.25f, 0.5f, 2.25f, -0.25f, -2});
    CHECK(changed(1, -1, 0) == F{2, 0, 0.5f, 4, 1, -2});
    CHECK(changed(2, 0.5f, 0.25f) == F{1, -2.75f, 0.5f, 0.25f, -0.75f, -2});  // repetition first
}

TEST_CASE("log-probabilities sum to one, the likeliest first, the lowest id among equals") {
    std::mt19937 random(5);
    for (int i = 0; i < 70; i++) {
        std::vector<float> logits = random_logits(random, i % 7);
        int V = int(logits.size()), id = int(random() % V);
        std::vector<int> order = sorted_ids(logits);
        std::vector<TokenLogprob> all = log_probabilities(logits, id, V);
        REQUIRE(int(all.size()) == V + 1);
        CHECK(all[0].id == id);
        double sum = 0;
        for (int n = 0; n < V; n++) {
            CHECK(all[n + 1].id == order[n]);
            if (all[n + 1].id == id) CHECK(all[n + 1].logprob == all[0].logprob);
            sum += std::exp(all[n + 1].logprob);
        }
        CHECK(sum == doctest::Approx(1).epsilon(1e-9));
        CHECK(log_probabilities(logits, id, 0).size() == 1);
        CHECK(log_probabilities(logits, id, V + 5).size() == size_t(V) + 1);
    }
    std::vector<TokenLogprob> two = log_probabilities(std::vector{0.0f, 1.0f, 1.0f, 0.0f}, 3, 2);
    REQUIRE(two.size() == 3);
    CHECK(two[1].id == 1);
    CHECK(two[2].id == 2);
    CHECK(two[0].logprob == doctest::Approx(-std::log(2 + 2 * std::exp(1.0))));
    CHECK(two[1].logprob == doctest::Approx(1 - std::log(2 + 2 * std::exp(1.0))));
}

TEST_CASE("values out of range are refused by name") {
    Sampling().check();
    auto refused = [](const std::string& name, float Sampling::*field, std::vector<float> bad,
                      std::vector<float> good) {
        bad.insert(bad.end(), {NAN, -NAN, INFINITY, -INFINITY});
        for (float value : bad) {
            Sampling s;
            s.*field = value;
            CAPTURE(value);
            CHECK(error_of([&] { s.check(); }).starts_with(name));
        }
        for (float value : good) {
            Sampling s;
            s.*field = value;
            CHECK(error_of([&] { s.check(); }) == "");
        }
    };
    refused("temperature", &Sampling::temperature, {-1, -1e-30f, 101}, {0, 1e-30f, 1, 100});
    refused("top-p", &Sampling::top_p, {0, -0.5f, 1.001f, 2}, {1e-6f, 0.5f, 1});
    refused("min-p", &Sampling::min_p, {-0.01f, 1.001f}, {0, 0.5f, 1});
    refused("repetition-penalty", &Sampling::repetition_penalty, {0, -1, 101}, {0.5f, 1, 100});
    refused("presence-penalty", &Sampling::presence_penalty, {-101, 101}, {-100, 0, 100});
    refused("frequency-penalty", &Sampling::frequency_penalty, {-101, 101}, {-100, 0, 100});
    Sampling s;
    s.top_k = -1;
    CHECK(error_of([&] { s.check(); }).starts_with("top-k"));
}
