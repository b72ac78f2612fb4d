// The whole model against transformers: logits, greedy ids, log-probabilities; and the same to the bit
// however the work is cut up.
#include "ops.hpp"

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

// What is switched off in turn: nothing, all chapters of the device, each of them.
std::vector<std::vector<string>> switched_off(const Model& m) {
    std::vector<std::vector<string>> all = {{}, {"all"}};
    const Engine e(m, {});
    for (const string& name : e.device->chapters) all.push_back({name});
    return all;
}

// Ids are equal up to the first choice that was closer than margin.
void check_ids(const std::vector<int>& ids, const json& one, double margin) {
    for (size_t i = 0; i < one["greedy"].size() && one["margin"][i] >= margin; i++) {
        REQUIRE(i < ids.size());
        CHECK(ids[i] == one["greedy"][i].get<int>());
    }
}

}  // namespace

TEST_CASE("logits of the last position are transformers', whatever is switched off") {
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        for (const auto& off : switched_off(m))
            for (const json& one : golden("models/" + name + "/golden.json")) {
                std::vector<float> ours = last_logits(m, one["prompt"], 512, off);
                INFO(name, ", without ", listed(off));
                CHECK(relative_errors(ours, one["last_logits"], 1).first < 1e-4);
                CHECK(ours == last_logits(m, one["prompt"], 7, off));  // to the bit
                CHECK(ours == last_logits(m, one["prompt"], 1, off));
            }
    }
}

TEST_CASE("greedy ids are transformers', and the same to the bit however the work is cut up") {
    struct Way {
        const char* name;
        EngineOptions options = {};
        int threads = 0;  // 0: as many as there are
    };
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        json all = golden("models/" + name + "/golden.json");
        std::vector<Request> requests = golden_requests(all);
        std::vector<Way> ways = {{"all in one batch"}, {"chunks of 7"}, {"a small pool"},
                                 {"no prefix cache"}, {"one thread", {}, 1}, {"two threads", {}, 2},
                                 {"three threads", {}, 3}};
        ways[1].options.chunk = 7, ways[1].options.max_rows = 4;
        ways[2].options.kv_memory = 14 * cpu_block_bytes(m);  // sequences are preempted
        ways[3].options.prefix_cache = false;
        for (const auto& off : switched_off(m)) {
            EngineOptions o;
            o.without = off;
            Engine plain(m, o);
            std::vector<Finished> alone;
            for (size_t i = 0; i < requests.size(); i++) {
                alone.push_back(run_one(plain, requests[i]));
                check_ids(alone[i].ids, all[i], 1e-3);
            }
            for (Way& way : ways) {
                INFO(name, ", without ", listed(off), ", ", way.name);
                const int before = omp_get_max_threads();
                if (way.threads) omp_set_num_threads(way.threads);
                way.options.without = off;
                Engine engine(m, way.options);
                auto results = run_all(engine, requests);
                omp_set_num_threads(before);
                for (size_t i = 0; i < requests.size(); i++) {
                    const Finished& f = results[{int(i), 0}];
                    CHECK(f.ids == alone[i].ids);
                    for (size_t t = 0; t < f.logprobs.size(); t++)  // every bit of logits counts
                        CHECK(f.logprobs[t].logprob == alone[i].logprobs[t].logprob);
                }
                CHECK(engine.cache.free() == engine.cache.blocks());
                if (&way == &ways[2]) CHECK(engine.preemptions > 0);
            }
        }
    }
}

TEST_CASE("score is transformers' log-probability, in any chunks, whatever is switched off") {
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        for (const auto& off : switched_off(m))
            for (const json& one : golden("models/" + name + "/golden.json")) {
                INFO(name, ", without ", listed(off));
                std::vector<double> first;
                for (int chunk : {512, 7}) {
                    EngineOptions o;
                    o.chunk = chunk, o.max_rows = 1, o.without = off;
                    Engine e(m, o);
                    Request r = greedy(one["prompt"], 1);
                    r.score_prompt = true;
                    for (int twice = 0; twice < 2; twice++) {  // a cached prompt is scored, too
                        std::vector<double> each = run_one(e, r).prompt_logprobs;
                        double sum = std::accumulate(each.begin(), each.end(), 0.0);
                        double want = one["prompt_logprob"];
                        CHECK(std::abs(sum - want) <= 1e-5 * std::abs(want));
                        if (first.empty()) first = each;
                        CHECK(each == first);
                    }
                }
            }
    }
}

TEST_CASE("a chapter that is not there cannot be switched off, and those that are there are named") {
    Model m(kData + "models/qwen3");
    for (const std::vector<string>& off : {std::vector<string>{"streams"}, {"all", "streams"},
                                           {"cpu-vectors", "streams"}}) {
        EngineOptions o;
        o.without = off;
        const std::string message = error_of([&] { Engine e(m, o); });
        CAPTURE(message);
        CHECK(message.find("--without streams") != std::string::npos);
        CHECK(message.find("cpu-vectors") != std::string::npos);
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
