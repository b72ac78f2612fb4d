// The whole model against transformers: logits, greedy ids, log-probabilities; and the same to the bit
// however the work is cut up.
#include "common.hpp"

namespace {

// Keeps the logits of the last draw.
struct LastLogits : Observer {
    std::vector<float> logits;
    void scheduled(const Flight&) override {}
    void collected(const Flight&) override {}
    void drawn(const Draw&, const Drawn&, std::span<const float> row) override {
        logits.assign(row.begin(), row.end());
    }
};

// The logits behind the last id of prompt, computed in chunks of the given size, without the
// chapters of without.
std::vector<float> last_logits(const Model& m, const std::vector<int>& prompt, int chunk,
                               const std::vector<string>& without = {}) {
    EngineOptions o;
    o.chunk = chunk, o.max_rows = 1, o.kv_memory = 64 * cpu_block_bytes(m), o.without = without;
    LastLogits last;
    Engine e(m, o);
    e.observer = &last;
    run_one(e, greedy(prompt, 1));
    return last.logits;
}

std::vector<Request> golden_requests(const json& all) {
    std::vector<Request> requests;
    for (const json& one : all) {
        requests.push_back(greedy(one["prompt"], int(one["greedy"].size())));
        requests.back().logprobs = 0;
    }
    return requests;
}

// Ids are equal up to the first choice that was closer than margin.
void check_ids(const std::vector<int>& ids, const json& one, double margin) {
    for (size_t i = 0; i < one["greedy"].size() && one["margin"][i] >= margin; i++) {
        REQUIRE(i < ids.size());
        CHECK(ids[i] == one["greedy"][i].get<int>());
    }
}

}  // namespace

TEST_CASE("logits of the last position are transformers'") {
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        for (const json& one : golden("models/" + name + "/golden.json")) {
            std::vector<float> ours = last_logits(m, one["prompt"], 512), theirs = one["last_logits"];
            double error = 0, norm = 0;
            for (size_t i = 0; i < theirs.size(); i++) {
                error += std::pow(ours[i] - theirs[i], 2);
                norm += std::pow(theirs[i], 2);
            }
            CAPTURE(name);
            CHECK(std::sqrt(error / norm) < 1e-4);
            CHECK(ours == last_logits(m, one["prompt"], 7));  // to the bit
            CHECK(ours == last_logits(m, one["prompt"], 1));
        }
    }
}

TEST_CASE("greedy ids are transformers', and the same to the bit however the work is cut up") {
    for (const std::string& name : kTiny) {
        CAPTURE(name);
        Model m(kData + "models/" + name);
        json all = golden("models/" + name + "/golden.json");
        std::vector<Request> requests = golden_requests(all);

        Engine plain(m, {});
        std::vector<Finished> alone;
        for (size_t i = 0; i < requests.size(); i++) {
            alone.push_back(run_one(plain, requests[i]));
            check_ids(alone[i].ids, all[i], 1e-3);
        }
        auto same = [&](Engine& engine) {
            auto results = run_all(engine, requests);
            for (size_t i = 0; i < requests.size(); i++) {
                const Finished& f = results[{int(i), 0}];
                CHECK(f.ids == alone[i].ids);
                for (size_t t = 0; t < f.logprobs.size(); t++)  // every bit of the logits counts here
                    CHECK(f.logprobs[t].logprob == alone[i].logprobs[t].logprob);
            }
            CHECK(engine.cache.free() == engine.cache.blocks());
        };
        SUBCASE("all in one batch") {
            Engine e(m, {});
            same(e);
        }
        SUBCASE("chunks of 7") {
            EngineOptions o;
            o.chunk = 7, o.max_rows = 4;
            Engine e(m, o);
            same(e);
        }
        SUBCASE("a pool so small that sequences are preempted") {
            EngineOptions o;
            o.kv_memory = 14 * cpu_block_bytes(m);
            Engine e(m, o);
            same(e);
            CHECK(e.preemptions > 0);
        }
        SUBCASE("no prefix cache") {
            EngineOptions o;
            o.prefix_cache = false;
            Engine e(m, o);
            same(e);
        }
        SUBCASE("other numbers of threads") {
            int before = omp_get_max_threads();
            for (int threads : {1, 2, 3}) {
                omp_set_num_threads(threads);
                Engine e(m, {});
                same(e);
            }
            omp_set_num_threads(before);
        }
    }
}

TEST_CASE("score is transformers' log-probability, in any chunks") {
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        for (const json& one : golden("models/" + name + "/golden.json")) {
            std::vector<double> first;
            for (int chunk : {512, 7}) {
                EngineOptions o;
                o.chunk = chunk, o.max_rows = 1;
                Engine e(m, o);
                Request r = greedy(one["prompt"], 1);
                r.score_prompt = true;
                for (int twice = 0; twice < 2; twice++) {  // a cached prompt is scored all the same
                    std::vector<double> each = run_one(e, r).prompt_logprobs;
                    double sum = std::accumulate(each.begin(), each.end(), 0.0), want = one["prompt_logprob"];
                    CHECK(std::abs(sum - want) <= 1e-5 * std::abs(want));
                    if (first.empty()) first = each;
                    CHECK(each == first);
                }
            }
        }
    }
}

TEST_CASE("demo model: greedy ids and perplexity are transformers'") {
    Model m(kDemo);
    Tokenizer tokenizer(kDemo);
    Chat chat = Chat::load(kDemo);
    Engine e(m, {});
    for (const json& one : golden("smollm2/greedy.json")) {
        std::string text = one["prompt"];
        std::vector<int> ids = tokenizer.encode(one["chat"] ? chat.render({{"user", text}}) : text);
        CHECK(ids == one["prompt_ids"].get<std::vector<int>>());
        Finished f = run_one(e, greedy(ids, int(one["greedy"].size())));
        check_ids(f.ids, one, 0.02);
    }
    Request r = greedy(tokenizer.encode(read_file(kData + "smollm2/perplexity.txt")), 1);
    r.score_prompt = true;
    std::vector<double> each = run_one(e, r).prompt_logprobs;
    double perplexity = std::exp(-std::accumulate(each.begin(), each.end(), 0.0) / double(each.size()));
    CHECK(perplexity == doctest::Approx(golden("smollm2/perplexity.json")["perplexity"].get<double>()).epsilon(1e-3));
}

TEST_CASE("dummy weights need only a config.json") {
    TempFolder folder;
    folder.write("config.json", read_file(kData + "models/qwen3/config.json"));
    Model a(folder.path, true), b(folder.path, true);
    Engine ea(a, {}), eb(b, {});
    Finished f = run_one(ea, greedy({1, 2, 3}, 20));
    CHECK(f.ids.size() == 20);
    CHECK(f.ids == run_one(eb, greedy({1, 2, 3}, 20)).ids);  // the same in every run
}
