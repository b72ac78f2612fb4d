// What is written for a team of threads, run by teams that play a thread block, against one thread.
// `make test-team` builds this file and ops.cpp by themselves, with ThreadSanitizer, which needs them
// to be without OpenMP.
#ifdef NANOCU_TEAM_ALONE
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "ops.cpp"
#endif
#include "team.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cfloat>
#include <random>

#include "../sampler.hpp"

namespace {

// Logits of many kinds: smooth, with ties, all equal, with -inf, with NaN, nothing but NaN, at the
// ends of float.
std::vector<float> logits_of(std::mt19937& random, int V, int kind) {
    std::normal_distribution<float> normal(0, 3);
    const float ends[] = {FLT_MAX, -FLT_MAX, 0.0f, -0.0f, FLT_MIN, -1e30f, -INFINITY};
    std::vector<float> logits(V);
    for (float& logit : logits) {
        logit = normal(random);
        if (kind == 1) logit = std::round(logit);
        if (kind == 2) logit = 1.5f;
        if (kind == 3 && random() % 4) logit = -INFINITY;
        if (kind == 4 && random() % 4) logit = NAN;
        if (kind == 5) logit = NAN;
        if (kind == 6) logit = ends[random() % 7];
    }
    return logits;
}

// The id that a team of so many threads draws; -1: none of them has one, -2: more than one has.
std::vector<int> draw_by_team(int threads, const std::vector<float>& logits,
                              const std::vector<Sampling>& samplings) {
    std::vector<int> ids(samplings.size(), -1);
    std::vector<std::atomic<int>> drawn(samplings.size());
    ThreadTeam::run(threads, kDrawScratch, [&](auto& team) {
        for (size_t i = 0; i < samplings.size(); i++) {
            int id = draw_id(team, logits.data(), int(logits.size()), samplings[i], 3, int(i));
            if (id >= 0) ids[i] = drawn[i]++ == 0 ? id : -2;
        }
    });
    return ids;
}

}  // namespace

TEST_CASE("a team's sums, maxima and groups") {
    for (int size : {1, 32, 128}) {
        ThreadTeam::run(size, sizeof(uint64_t), [&](auto& team) {
            bool right = team.sum(float(team.rank)) == float(size * (size - 1) / 2);
            right &= team.max(float(team.rank * 7 % size)) == float(size - 1);
            right &= team.max(-float(team.rank)) == 0;
            uint64_t total, before = team.before(uint64_t(team.rank) << 40, total);
            right &= before == uint64_t(team.rank * (team.rank - 1) / 2) << 40;
            right &= total == uint64_t(size * (size - 1) / 2) << 40;
            for (int n = 1; n <= 32; n *= 2) {
                auto group = team.group(n);
                int lanes = size == 1 ? 1 : n, first = team.rank / lanes * lanes;
                right &= group.rank == team.rank % lanes && group.size == lanes;
                right &= group.index == team.rank / lanes && group.count == size / lanes;
                right &= group.sum(1) == lanes && group.max(team.rank) == first + lanes - 1;
            }
            uint64_t& number = *(uint64_t*)team.scratch;
            if (team.rank == 0) number = 5;
            team.barrier();
            team.add(number, 7);
            team.barrier();
            right &= number == 5 + 7 * uint64_t(size);
            if (!right) FAIL_CHECK("rank ", team.rank, " of ", size);
        });
    }
}

TEST_CASE("a team whose threads do not all meet is found out") {
    auto error_of_team = [](auto work) {
        try {
            ThreadTeam::run(64, 0, work);
        } catch (const std::logic_error& e) {
            return std::string(e.what());
        }
        return std::string();
    };
    CHECK(error_of_team([](auto& team) { team.sum(1), team.group(8).sum(1); }) == "");
    // one warp may do more than another, but not one group in it
    CHECK(error_of_team([](auto& team) { if (team.rank < 32) team.group(8).sum(1); }) == "");
    CHECK(error_of_team([](auto& team) { if (team.rank < 8) team.group(8).sum(1); })
              .find("of a warp") != std::string::npos);
    CHECK(error_of_team([](auto& team) { if (team.rank != 5) team.barrier(); })
              .find("of the team") != std::string::npos);
    CHECK(error_of_team([](auto& team) { if (team.rank < 32) team.max(1.0f); })
              .find("of the team") != std::string::npos);
}

TEST_CASE("a team of any size draws what one thread draws") {
    std::mt19937 random(11);
    const int sizes[] = {1, 2, 31, 33, 257, 5000};
    for (int round = 0; round < 42; round++) {
        int V = sizes[round % 6], kind = round / 6;
        std::vector<float> logits = logits_of(random, V, kind);
        std::vector<Sampling> samplings(3);
        for (Sampling& s : samplings) {
            s.temperature = std::array{0.0f, 0.1f, 0.7f, 0.7f, 1.5f, 1.5f}[random() % 6];
            s.seed = random();
            if (random() % 2) s.top_k = 1 + int(random() % (random() % 2 ? 40 : V));
            if (random() % 2) s.top_p = float(1 + random() % 999) / 1000;
            if (random() % 2) s.min_p = float(random() % 1000) / 10000;
        }
        std::vector<int> expected;
        for (size_t i = 0; i < samplings.size(); i++)
            expected.push_back(sample_id(logits, samplings[i], 3, int(i)));
        for (int threads : {1, 32, 128}) {
            if (threads == 128 && round % 3 > 0) continue;  // they wait for each other for long
            CAPTURE(V);
            CAPTURE(kind);
            CAPTURE(threads);
            CHECK(draw_by_team(threads, logits, samplings) == expected);
        }
    }
}

TEST_CASE("a team draws from as many logits as a real vocabulary has") {
    std::mt19937 random(12);
    std::vector<float> logits = logits_of(random, 151936, 0);
    std::vector<Sampling> samplings(4);
    samplings[1].temperature = samplings[2].temperature = samplings[3].temperature = 0.6f;
    samplings[2].top_k = 20, samplings[2].top_p = 0.95f;
    samplings[3].top_p = 0.9f;
    std::vector<int> expected;
    for (size_t i = 0; i < samplings.size(); i++)
        expected.push_back(sample_id(logits, samplings[i], 3, int(i)));
    for (int threads : {32, 128}) CHECK(draw_by_team(threads, logits, samplings) == expected);
}
