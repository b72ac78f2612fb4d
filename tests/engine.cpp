// The engine: prefix reuse, samples, seeds, scheduling, refusals. What a request gets never depends
// on the company it runs in.
#include "common.hpp"

namespace {

// A tiny model gains nothing from threads, which only wait for each other where others are at work.
struct OneThread {
    int before = omp_get_max_threads();
    OneThread() { omp_set_num_threads(1); }
    ~OneThread() { omp_set_num_threads(before); }
};

// The tiny Qwen3, and one thread while it lives.
struct TinyModel : OneThread, Model {
    TinyModel() : Model(kData + "models/qwen3") {}
};

std::vector<int> prompt_of(int tokens, int seed = 0) {
    std::vector<int> ids;
    for (int i = 0; i < tokens; i++) ids.push_back((i * 7919 + seed * 104729 + i * i % 31) % 512);
    return ids;
}

EngineOptions options(const Model& m, int blocks, int chunk = 512, int rows = 64) {
    EngineOptions o;
    o.kv_memory = size_t(blocks) * cpu_block_bytes(m);
    o.chunk = chunk, o.max_rows = rows;
    return o;
}

// A request that draws from a flat distribution and tells every bit of its logits.
Request drawing(std::vector<int> prompt, int max_tokens, uint64_t seed, int samples = 1) {
    Request r = greedy(std::move(prompt), max_tokens);
    r.sampling.temperature = 5;
    r.sampling.seed = seed;
    r.samples = samples;
    r.logprobs = 2;
    return r;
}

// Whether b begins as a, to the bit.
bool begins_as(const std::vector<TokenLogprob>& b, const std::vector<TokenLogprob>& a) {
    auto same = [](const TokenLogprob& x, const TokenLogprob& y) {
        return x.id == y.id && x.logprob == y.logprob;
    };
    return a.size() <= b.size() && std::equal(a.begin(), a.end(), b.begin(), same);
}

// To the bit; how much came from the cache may differ.
bool same_result(const Finished& a, const Finished& b) {
    return a.ids == b.ids && a.finish == b.finish && a.prompt_logprobs == b.prompt_logprobs &&
           a.logprobs.size() == b.logprobs.size() && begins_as(a.logprobs, b.logprobs);
}

// Counts the tokens that are computed.
struct Computed : Observer {
    int64_t tokens = 0;
    void scheduled(const Flight& flight) override { tokens += flight.step->tokens(); }
    void collected(const Flight&) override {}
    void drawn(const Draw&, const Drawn&, std::span<const float>) override {}
};

// Blocks in use after each step, the most of them.
int peak_blocks(Engine& e, const Request& r) {
    int peak = 0;
    e.add(r);
    while (e.busy()) {
        e.step();
        peak = std::max(peak, e.cache.blocks() - e.cache.free());
    }
    return peak;
}

bool all_free(const Engine& e) { return !e.busy() && e.cache.free() == e.cache.blocks(); }

}  // namespace

TEST_CASE("asked twice, a prompt is found but for its end, and the result is the same to the bit") {
    TinyModel m;
    for (int tokens : {1, 15, 16, 17, 32, 33, 100, 160}) {
        Engine e(m, options(m, 100));
        Request r = greedy(prompt_of(tokens), 20);
        r.logprobs = 3;
        Finished first = run_one(e, r), second = run_one(e, r);
        CHECK(first.cached == 0);
        CHECK(second.cached == (tokens - 1) / 16 * 16);
        CHECK(first.ids.size() == 20);
        CHECK(first.logprobs.size() == 20 * 4);
        CHECK(same_result(first, second));
        CHECK(all_free(e));
    }
}

TEST_CASE("demo model: asked twice, of a prompt of 1,000 tokens less than a tenth is computed again") {
    Model m(kDemo);
    Engine e(m, options(m, 80));
    Computed computed;
    e.observer = &computed;
    Request r = greedy(prompt_of(kSanitized ? 200 : 1000), 4);
    r.logprobs = 3;
    Finished first = run_one(e, r);
    int64_t at_first = std::exchange(computed.tokens, 0);
    Finished second = run_one(e, r);
    CHECK(second.cached == int(r.prompt.size() - 1) / 16 * 16);
    CHECK(same_result(first, second));
    CHECK(at_first == int64_t(r.prompt.size()) + 3);
    CHECK(computed.tokens * 10 < at_first);
}

TEST_CASE("generated text is found again by a prompt that goes on behind it") {
    TinyModel m;
    Engine e(m, options(m, 100)), fresh(m, options(m, 100));
    std::vector<int> ids = prompt_of(40);
    for (int turn = 0; turn < 4; turn++) {
        Finished answer = run_one(e, greedy(ids, 30));
        // the last block of an answer ends before its last id, which was never computed
        CHECK(answer.cached == (turn ? (int(ids.size()) - 3 - 1) / 16 * 16 : 0));
        CHECK(answer.ids == run_one(fresh, greedy(ids, 30)).ids);
        ids.insert(ids.end(), answer.ids.begin(), answer.ids.end());
        for (int i = 0; i < 3; i++) ids.push_back(100 + turn);
    }
}

TEST_CASE("without the prefix cache nothing is reused") {
    TinyModel m;
    EngineOptions o = options(m, 100);
    o.prefix_cache = false;
    Engine e(m, o);
    const Request r = greedy(prompt_of(50), 5);
    Finished first = run_one(e, r), second = run_one(e, r);
    CHECK(second.cached == 0);
    CHECK(second.ids == first.ids);
}

TEST_CASE("4 samples of 64 tokens behind 1,000 take under 1.3 times the blocks of one") {
    TinyModel m;
    Engine a(m, options(m, 400)), b(m, options(m, 400));
    Request r = drawing(prompt_of(1000), 64, 1);
    int one = peak_blocks(a, r);
    r.samples = 4;
    int four = peak_blocks(b, r);
    CHECK(one == Cache::blocks_for(1063));
    CHECK(four < 1.3 * one);
    CHECK(all_free(b));
}

TEST_CASE("a sample is decided by its seed, index and prompt, whatever runs beside it and how") {
    TinyModel m;
    const Request r = drawing(prompt_of(75), 40, 7, 4);  // its last block is shared by the samples
    // one at a time, every prompt computed from its beginning: nothing to go wrong
    EngineOptions plain = options(m, 100, 512, 1);
    plain.prefix_cache = false;
    Engine alone(m, plain);
    auto want = run_all(alone, {r});
    REQUIRE(want.size() == 4);
    for (int i = 0; i < 4; i++) {
        CHECK(want[{0, i}].ids.size() == 40);
        CHECK(want[{0, i}].finish == "length");
        for (int j = 0; j < i; j++) CHECK(want[{0, i}].ids != want[{0, j}].ids);
    }
    auto same = [&](Engine& e, const std::vector<Request>& requests, int at) {
        auto results = run_all(e, requests);
        for (int i = 0; i < requests[at].samples; i++) {
            CAPTURE(i);
            CHECK(same_result(results[{at, i}], want[{0, i}]));
        }
        CHECK(all_free(e));
    };
    const Request other = drawing(prompt_of(90, 1), 30, 7), third = greedy(prompt_of(20, 2), 50);
    SUBCASE("all at once") {
        Engine e(m, options(m, 100));
        same(e, {r}, 0);
        same(e, {r}, 0);  // and again, from the cache
    }
    SUBCASE("only two of the samples") {
        Engine e(m, options(m, 100));
        Request two = r;
        two.samples = 2;
        same(e, {two}, 0);
    }
    SUBCASE("others beside it") {
        Engine e(m, options(m, 100));
        same(e, {other, third, r, other}, 2);
    }
    SUBCASE("the same prompt beside it, with other seeds") {
        Engine e(m, options(m, 100));
        same(e, {drawing(r.prompt, 40, 8, 2), r, drawing(r.prompt, 40, 9)}, 1);
    }
    SUBCASE("fewer rows than samples, small chunks") {
        for (int rows : {2, 3}) {
            Engine e(m, options(m, 100, 5, rows));
            same(e, {other, r}, 1);
        }
    }
    SUBCASE("no prefix cache") {
        EngineOptions o = options(m, 100);
        o.prefix_cache = false;
        Engine e(m, o);
        same(e, {r, other}, 0);
    }
    SUBCASE("so few blocks that sequences are preempted") {
        for (int blocks : {8, 10, 12, 14}) {
            Engine e(m, options(m, blocks, 20));
            same(e, {other, r, third}, 1);
            CHECK(e.preemptions > 0);
        }
    }
}

TEST_CASE("a block that is copied in a step may be taken by another sequence in the same step") {
    TinyModel m;
    Engine alone(m, options(m, 10)), e(m, options(m, 4));
    // Both prompts are computed in the first step, then the samples share the second block of the
    // first one. In the second step sample 0 copies it into the last free block, and the other
    // request needs a block: sample 1 is preempted, and the one it gives back is just that source.
    std::vector<Request> requests = {drawing(prompt_of(20), 10, 1, 2),
                                     drawing(prompt_of(16, 1), 10, 2)};
    auto results = run_all(e, requests), want = run_all(alone, {requests[0]});
    CHECK(e.preemptions > 0);
    CHECK(same_result(results[{0, 0}], want[{0, 0}]));
    CHECK(same_result(results[{0, 1}], want[{0, 1}]));
    CHECK(same_result(results[{1, 0}], run_one(alone, requests[1])));
}

TEST_CASE("what a preempted sequence finds again of its own does not count as cached") {
    TinyModel m;
    Engine e(m, options(m, 8));
    auto results = run_all(e, {greedy(prompt_of(40), 40), greedy(prompt_of(40, 1), 40)});
    CHECK(e.preemptions > 0);
    for (int i : {0, 1}) CHECK(results[{i, 0}].cached == 0);
    CHECK(results[{1, 0}].ids.size() == 40);
}

TEST_CASE("seeded requests give the same ids alone and in any batch; another seed gives others") {
    TinyModel m;
    std::vector<Request> requests;
    for (int i = 0; i < 12; i++) {
        requests.push_back(drawing(prompt_of(5 + i * 3 % 20, i % 3), 15, 100 + i));
        Sampling& s = requests.back().sampling;
        if (i % 2) s.top_k = 50;
        if (i % 3) s.top_p = 0.9f;
        if (i % 4) s.min_p = 0.05f;
    }
    Engine alone(m, options(m, 100)), batch(m, options(m, 100)), few(m, options(m, 6, 3, 5));
    auto a = run_all(batch, requests), b = run_all(few, requests);
    for (int i = 0; i < 12; i++) {
        Finished one = run_one(alone, requests[i]);
        CHECK(same_result(one, a[{i, 0}]));
        CHECK(same_result(one, b[{i, 0}]));
        Request reseeded = requests[i];
        reseeded.sampling.seed += 1000;
        CHECK(run_one(alone, reseeded).ids != one.ids);
    }
}

TEST_CASE("stop ends a sample or a request, waiting or running, and its blocks are free at once") {
    TinyModel m;
    Engine e(m, options(m, 40, 16, 3));
    int a = e.add(drawing(prompt_of(30), 100, 1, 2)), b = e.add(drawing(prompt_of(40, 1), 100, 2));
    int c = e.add(greedy(prompt_of(20, 2), 10));
    CHECK(a != b);
    for (int i = 0; i < 8; i++) e.step();
    std::map<std::pair<int, int>, int> seen;
    auto look = [&] {
        seen.clear();
        for (int i = 0; i < 3; i++)
            for (Output& o : e.step()) seen[{o.request, o.sample}]++;
    };
    look();
    CHECK(seen.count({a, 0}));
    CHECK(seen.count({a, 1}));
    CHECK(seen.count({b, 0}));
    CHECK(!seen.count({c, 0}));  // no row for it yet
    e.stop(a, 0);
    look();
    CHECK(!seen.count({a, 0}));
    CHECK(seen.count({a, 1}));
    CHECK(seen.count({c, 0}));
    e.stop(b, -1);
    e.stop(a, -1);
    e.stop(77, -1);  // nobody
    while (e.busy())
        for (Output& o : e.step()) CHECK(o.request == c);
    CHECK(all_free(e));
    e.stop(e.add(greedy(prompt_of(20), 5)), -1);  // before its first step
    CHECK(all_free(e));
    e.add(greedy(prompt_of(60), 5));
    e.step();  // in the middle of its prompt
    CHECK(e.cache.free() < e.cache.blocks());
    e.stop(c + 2, -1);
    CHECK(all_free(e));
}

TEST_CASE("without max_tokens a text goes on to the end of the context, or of the memory") {
    TinyModel m;
    EngineOptions o = options(m, 20);
    o.max_context = 50;
    Engine small(m, o), full(m, options(m, 4));
    Finished f = run_one(small, greedy(prompt_of(20), INT_MAX));
    CHECK(f.ids.size() == 30);
    CHECK(f.finish == "length");
    CHECK(run_one(small, greedy(prompt_of(20), 1000)).ids.size() == 30);
    CHECK(run_one(full, greedy(prompt_of(20), INT_MAX)).ids.size() == 44);
    CHECK(all_free(full));
}

TEST_CASE("an end id ends the text and is part of it; ignore_eos goes on") {
    TinyModel m;
    Engine e(m, options(m, 50));
    Request r = drawing(prompt_of(20), 30, 3);
    std::vector<int> ids = run_one(e, r).ids;
    m.config.eos = {ids[12], ids[20]};
    auto end = std::ranges::find(ids, ids[12]) + 1;
    end = std::min(end, std::ranges::find(ids, ids[20]) + 1);
    Finished f = run_one(e, r);
    CHECK(f.finish == "stop");
    CHECK(f.ids == std::vector(ids.begin(), end));
    CHECK(f.logprobs.size() == f.ids.size() * 3);
    CHECK(all_free(e));
    r.max_tokens = int(f.ids.size());  // both at once: it stopped by itself
    CHECK(run_one(e, r).finish == "stop");
    r.max_tokens--;
    CHECK(run_one(e, r).finish == "length");
    r.max_tokens = 30;
    r.ignore_eos = true;
    f = run_one(e, r);
    CHECK(f.ids == ids);
    CHECK(f.finish == "length");
}

TEST_CASE("a request that can never run is refused with the sizes, and the engine goes on") {
    TinyModel m;
    EngineOptions o = options(m, 5);
    o.max_context = 300;
    Engine e(m, o);
    auto refusal = [&](const Request& r) { return error_of([&] { e.add(r); }); };
    auto has = [](const std::string& text, const char* part) {
        return text.find(part) != std::string::npos;
    };
    std::string error = refusal(greedy(prompt_of(70), 30));  // 99 tokens to compute, 80 fit
    CHECK(has(error, "70"));
    CHECK(has(error, "30"));
    CHECK(has(error, "80"));
    error = refusal(greedy(prompt_of(301), 1));
    CHECK(has(error, "301"));
    CHECK(has(error, "300"));
    CHECK(refusal(greedy(prompt_of(300), 1)) != "");  // no room for what is generated
    CHECK(refusal(greedy({}, 1)) != "");
    CHECK(has(refusal(greedy({1, 512, 3}, 1)), "512"));
    CHECK(has(refusal(greedy({1, -1}, 1)), "-1"));
    CHECK(refusal(greedy({1, 2}, 0)) != "");
    Request r = greedy({1, 2}, 1);
    r.samples = 0;
    CHECK(refusal(r) != "");
    r.samples = 1;
    r.sampling.top_p = 2;
    CHECK(has(refusal(r), "top-p"));
    CHECK(!e.busy());
    // exactly what fits runs: the last id is never computed
    CHECK(refusal(greedy(prompt_of(70), 12)) != "");
    CHECK(run_one(e, greedy(prompt_of(70), 11)).ids.size() == 11);
    CHECK(run_one(e, greedy(prompt_of(80), 1)).ids.size() == 1);
    CHECK(all_free(e));
    o.kv_memory = 100;
    CHECK(error_of([&] { Engine none(m, o); }) != "");
}

TEST_CASE("penalties act on what the engine generates") {
    TinyModel m;
    Engine e(m, options(m, 50));
    Request r = greedy(prompt_of(20), 40);
    const int first = run_one(e, r).ids[0];
    CHECK(std::ranges::count(r.prompt, first) == 0);
    r.sampling.presence_penalty = 100;  // nothing twice
    std::vector<int> ids = run_one(e, r).ids;
    CHECK(std::set(ids.begin(), ids.end()).size() == 40);
    r.sampling.presence_penalty = -100;  // the first again and again, and none of the prompt
    ids = run_one(e, r).ids;
    CHECK(ids == std::vector(40, first));
    r.sampling.presence_penalty = 0;
    r.sampling.frequency_penalty = 100;
    ids = run_one(e, r).ids;
    CHECK(std::set(ids.begin(), ids.end()).size() == 40);
    r.sampling.frequency_penalty = 0;
    // logits of the prompt's ids become tiny or very negative: what follows is no id of the prompt,
    // unless nothing is above them
    r.sampling.repetition_penalty = 100;
    r.logprobs = 0;
    Finished f = run_one(e, r);
    for (int id : f.ids) CHECK(std::ranges::count(r.prompt, id) == 0);
    CHECK(std::set(f.ids.begin(), f.ids.end()).size() == 40);
    // each step by hand, from the logits that the log-probabilities are
    r.sampling.repetition_penalty = 1;
    r.sampling.presence_penalty = 0.3f;
    r.sampling.frequency_penalty = 0.2f;
    r.logprobs = 512;
    f = run_one(e, r);
    REQUIRE(f.logprobs.size() == 40 * 513);
    std::vector<int> output;
    for (int t = 0; t < 40; t++) {
        std::vector<float> logits(512);
        for (int i = 1; i <= 512; i++) {
            const TokenLogprob& l = f.logprobs[t * 513 + i];
            double times = double(std::ranges::count(output, l.id));
            logits[l.id] = float(l.logprob - 0.2 * times - (times ? 0.3 : 0));
        }
        CHECK(f.ids[t] == argmax(logits));
        output.push_back(f.ids[t]);
    }
}

TEST_CASE("logprobs k gives the chosen id and the k likeliest, before temperature and penalties") {
    TinyModel m;
    Engine e(m, options(m, 50));
    Request r = greedy(prompt_of(20), 10);
    CHECK(run_one(e, r).logprobs.empty());
    r.logprobs = 512;
    Finished all = run_one(e, r);
    REQUIRE(all.logprobs.size() == 10 * 513);
    for (int t = 0; t < 10; t++) {
        const TokenLogprob* one = &all.logprobs[t * 513];
        double sum = 0;
        for (int i = 1; i <= 512; i++) {
            sum += std::exp(one[i].logprob);
            if (i > 1) CHECK(one[i].logprob <= one[i - 1].logprob);
        }
        CHECK(sum == doctest::Approx(1).epsilon(1e-9));
        CHECK(one[0].id == all.ids[t]);
        CHECK(one[1].id == all.ids[t]);  // greedy
        CHECK(one[1].logprob == one[0].logprob);
    }
    r.sampling.temperature = 3;
    r.sampling.top_k = 5;
    r.sampling.presence_penalty = 2;
    r.max_tokens = 1;
    Finished drawn = run_one(e, r);
    CHECK(drawn.logprobs[0].id == drawn.ids[0]);
    for (int i = 1; i <= 512; i++) CHECK(drawn.logprobs[i].logprob == all.logprobs[i].logprob);
}

TEST_CASE("requests that are scored together have each its own log-probabilities") {
    TinyModel m;
    Engine alone(m, options(m, 100));
    std::vector<Request> requests;
    std::vector<Finished> want;
    for (int i = 0; i < 6; i++) {
        requests.push_back(greedy(prompt_of(5 + 17 * i, i), 1 + i % 3));
        requests.back().score_prompt = true;
        want.push_back(run_one(alone, requests[i]));
        CHECK(int(want[i].prompt_logprobs.size()) == 4 + 17 * i);
    }
    for (int chunk : {4, 7, 16, 64}) {
        Engine e(m, options(m, 12, chunk, 4));
        auto results = run_all(e, requests);
        for (int i = 0; i < 6; i++) CHECK(same_result(results[{i, 0}], want[i]));
    }
}

// A CPU that is as late as a GPU: the engine learns a step's ids one step later, and until then the
// next step takes them from where the device left them.
struct LateDevice : CpuDevice {
    using CpuDevice::CpuDevice;
    void launch(Step& step) override {
        CpuDevice::launch(step);
        for (size_t i = 0; i < step.drawn.size() && i < max_draws; i++)
            drawn[i] = step.drawn[i].id;
    }
};

TEST_CASE("a device that overlaps: sequences that end while they are on their way leave nothing behind") {
    TinyModel m;
    auto make = devices.cpu;
    devices.cpu = [](const Model& m, const DeviceOptions& o) -> std::unique_ptr<Device> {
        const PageLayout pages = PageLayout::by_token(m.config.head_dim);
        auto device = std::make_unique<LateDevice>(m, o, pages, pages);
        device->overlaps = true;
        return device;
    };
    EngineOptions plain = options(m, 30);
    plain.prefix_cache = false, plain.without = {};
    Engine late(m, options(m, 7, 16, 3));  // so few blocks that one that is given back is taken at once
    devices.cpu = [](const Model& m, const DeviceOptions& o) -> std::unique_ptr<Device> {
        const PageLayout pages = PageLayout::by_token(m.config.head_dim);
        return std::make_unique<CpuDevice>(m, o, pages, pages);
    };
    Engine alone(m, plain);
    devices.cpu = make;
    std::vector<Request> requests;
    for (int i = 0; i < 120; i++) {
        Request r = drawing(prompt_of(1 + i * 7 % 40, i % 3), 40, i);
        r.logprobs = -1;
        requests.push_back(r);
    }
    // every request ends by an id of its own, somewhere in its text, at any place of a block
    for (int i = 0; i < 120; i += 3) {
        m.config.eos.clear();
        m.config.eos = {run_one(alone, requests[i]).ids.at(i % 40)};
        std::vector<Request> three(requests.begin() + i, requests.begin() + i + 3);
        auto results = run_all(late, three);
        for (int j = 0; j < 3; j++) {
            Finished want = run_one(alone, three[j]);
            CAPTURE(i + j);
            CHECK(results[{j, 0}].ids == want.ids);
            CHECK(results[{j, 0}].finish == want.finish);
        }
        REQUIRE(all_free(late));
    }
    m.config.eos.clear();
}

TEST_CASE("200 random requests, some stopped, in little memory: each as if alone, no block lost") {
    TinyModel m;
    const int count = kSanitized ? 60 : 200;
    std::mt19937 random(11);
    Engine e(m, options(m, 7, 5, 3));
    EngineOptions plain = options(m, 30);
    plain.prefix_cache = false;
    Engine alone(m, plain);
    std::vector<Request> requests;
    for (int i = 0; i < count; i++) {
        // beginnings of three texts, sometimes with an end of their own
        std::vector<int> prompt = prompt_of(1 + int(random() % 70), int(random() % 3));
        if (random() % 2) prompt.back() = int(random() % 512);
        int samples = random() % 4 ? 1 : 1 + int(random() % 4);
        Request r = drawing(prompt, 1 + int(random() % 23), i, samples);
        if (random() % 4 == 0) r.sampling.temperature = 0;
        if (random() % 4 == 0) r.sampling.repetition_penalty = 1.3f;
        if (random() % 4 == 0) r.sampling.top_p = 0.8f;
        r.score_prompt = r.samples == 1 && random() % 8 == 0;
        requests.push_back(r);
    }
    std::map<std::pair<int, int>, Finished> results;
    std::set<std::pair<int, int>> stopped;
    for (int added = 0; added < count || e.busy();) {
        if (added < count && (!e.busy() || random() % 3 == 0)) {
            CHECK(e.add(requests[added]) == added);
            added++;
        }
        for (Output& o : e.step()) {
            std::pair<int, int> key = {o.request, o.sample};
            REQUIRE(!stopped.count(key));
            Finished& f = results[key];
            REQUIRE(f.finish == "");
            if (o.id >= 0) f.ids.push_back(o.id);
            f.logprobs.insert(f.logprobs.end(), o.logprobs.begin(), o.logprobs.end());
            if (!o.finish) continue;
            f.finish = o.finish;
            for (const auto& l : o.prompt_logprobs) f.prompt_logprobs.push_back(l[0].logprob);
        }
        if (random() % 20) continue;
        for (const auto& [key, f] : results) {
            if (f.finish != "" || stopped.count(key) || random() % 2) continue;
            e.stop(key.first, key.second);
            stopped.insert(key);
        }
    }
    CHECK(all_free(e));
    CHECK(e.preemptions > count / 10);
    CHECK(int(stopped.size()) > count / 20);
    for (int i = 0; i < count; i++) {
        auto want = run_all(alone, {requests[i]});
        for (int sample = 0; sample < requests[i].samples; sample++) {
            CAPTURE(i);
            CAPTURE(sample);
            const Finished &f = results[{i, sample}], &w = want[{0, sample}];
            if (!stopped.count({i, sample})) {
                CHECK(same_result(f, w));
            } else {
                REQUIRE(f.ids.size() <= w.ids.size());
                CHECK(std::equal(f.ids.begin(), f.ids.end(), w.ids.begin()));
                CHECK(begins_as(w.logprobs, f.logprobs));
            }
        }
    }
    CHECK(all_free(alone));
}
