// The GPU against the CPU: teams and their draws, each op, whole models; and what does not fit. Run by
// `make test-gpu`. The stream of a device does not wait for what is done outside of it, nor that for
// the stream: so tests wait for all, before and behind what they do.
#include "twins.hpp"

namespace {

template <class T>
struct OnDevice {
    T* data;
    explicit OnDevice(const std::vector<T>& v) {
        check(cudaMalloc(&data, v.size() * sizeof(T)), "test");
        check(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "test");
    }
    ~OnDevice() { cudaFree(data); }
    std::vector<T> get(size_t n) const {
        std::vector<T> v(n);
        check(cudaMemcpy(v.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost), "test");
        return v;
    }
};

void wait_for_all() { check(cudaDeviceSynchronize(), "test"); }

// The device that engines have, with all chapters on it.
using Full = cuda::Stream<cuda::FastDraw<cuda::SharedPrefix<cuda::PrefillAttention<
    cuda::DecodeAttention<cuda::FewRows<CudaDevice>>>>>>;

const vector<string> kChapters = {"few-rows", "decode-attention", "prefill-attention",
                                  "shared-prefix", "fast-draw", "stream"};

// All chapters but those: what to switch off so that only they are on.
vector<string> all_but(const vector<string>& these) {
    vector<string> off;
    for (const string& name : kChapters) if (!std::ranges::count(these, name)) off.push_back(name);
    return off;
}

// That device, its ops open. Steps have up to so many tokens, and arrays room for one row more.
struct Opened : Full {
    NANOCU_OPEN(Full);
    using Full::arguments, Full::decode_step, Full::draw, Full::forward, Full::graphs;
    using Full::ready_words, Full::stream, Full::streamed_steps, Full::takes, Full::upload;
    const size_t room;  // in rows

    Opened(const Model& m, int tokens, int rows, int blocks, vector<string> without = {})
        : Full(m, {tokens + 1, rows, 0, false, without}, cuda::matrix_pages(m.config.head_dim),
               cuda::matrix_pages(m.config.head_dim)),
          room(std::max(tokens + 1, kLogitRows)) {
        reserve(blocks);
        // slots that are not written yet may hold any number; 0x4343 is 195, which would show
        poison(kv, blocks * c.block_numbers(), 0x43);
        share_from = INT_MIN;  // blocks are shared even where it does not pay
    }
    template <class T>
    void poison(const Owned<T*, cudaFree>& array, size_t count, int byte) {
        wait_for_all();
        check(cudaMemset((T*)array, byte, count * sizeof(T)), "test");
        wait_for_all();
    }
    // Whatever ops write becomes NaN, so that it shows if they do not.
    void poison() {
        poison(x, room * c.hidden, 0xFF), poison(normed, room * c.hidden, 0xFF);
        poison(qkv, room * c.qkv_dim(), 0xFF), poison(att, room * c.q_dim(), 0xFF);
        poison(gate_up, room * 2 * c.intermediate, 0xFF), poison(h, room * c.intermediate, 0xFF);
        poison(angles, room * c.head_dim, 0xFF);
        poison(logits, size_t(kLogitRows) * c.vocab, 0xFF);
    }
    // padded: rows of a captured step; else 0. one_each: as decode_step needs it.
    StepArrays lay(Step& step, int padded = 0, bool one_each = false) {
        wait_for_all();  // the arrays of the step before may be in use
        return upload(step, std::max(step.tokens(), padded), one_each || padded, padded);
    }
    static void all(auto op) {
        op();
        wait_for_all();
    }
    template <class T>
    static void put(T* to, const std::vector<float>& values) {
        std::vector<T> raw;
        for (float v : values) raw.push_back(T(v));
        wait_for_all();
        check(cudaMemcpy(to, raw.data(), raw.size() * sizeof(T), cudaMemcpyHostToDevice), "test");
        wait_for_all();
    }
    template <class T>
    static std::vector<float> get(const T* from, size_t n) {
        std::vector<T> raw(n);
        wait_for_all();
        check(cudaMemcpy(raw.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost), "test");
        return {raw.begin(), raw.end()};
    }
    template <class T>
    static std::vector<float> get(const Owned<T*, cudaFree>& from, size_t n) {
        return get((const T*)(T*)from, n);
    }
    template <class T>
    static void put(const Owned<T*, cudaFree>& to, const std::vector<float>& values) {
        put((T*)to, values);
    }
    void put_input(bf16* to, const std::vector<float>& rows) { put(to, rows); }
    std::vector<float> get_input(const bf16* from, size_t n) { return get(from, n); }
    void put_qkv(const std::vector<float>& rows, const std::vector<float>&) { put(qkv, rows); }

    // Whether a chapter is switched on, and can do its part here.
    bool on(const string& chapter) const {
        return std::ranges::any_of(served, [&](const auto& op) {
            return op.second.starts_with(chapter) || op.second.find(", else " + chapter) != string::npos;
        });
    }
};

// The logits of all positions of a prompt, which is computed in one step.
std::vector<float> all_logits(Opened& gpu, const std::vector<int>& prompt) {
    const int T = int(prompt.size());
    std::vector<int> table(Cache::blocks_for(T));
    std::iota(table.rbegin(), table.rend(), 0);
    Step step;
    add_part(step, table, 0, T);
    step.ids = prompt;
    step.logit_rows = step.positions;
    const StepArrays s = gpu.lay(step);
    gpu.poison();
    gpu.all([&] { gpu.forward(s); });
    std::vector<float> all = logits_of(gpu, s, T);
    all.resize(size_t(T) * gpu.c.vocab);
    return all;
}

EngineOptions on_gpu(int mebibytes) {
    EngineOptions o;
    o.device = "cuda", o.kv_memory = size_t(mebibytes) << 20;
    return o;
}

// Golden prompts through the engine: ids are the golden ones, up to the first close choice.
// score: so are the log-probabilities of the prompts.
void check_golden(const Model& m, const json& all, const EngineOptions& o, int ids, bool score) {
    std::vector<Request> requests;
    for (const json& one : all) {
        Request& r = requests.emplace_back(greedy(one["prompt"], ids));
        r.ignore_eos = true, r.score_prompt = score;
    }
    Engine e(m, o);
    for (auto& [key, f] : run_all(e, requests)) {
        const json& one = all[key.first];
        REQUIRE(int(f.ids.size()) == ids);
        for (int i = 0; i < ids && one["margin"][i] >= 2.0; i++)
            CHECK(f.ids[i] == one["greedy"][i].get<int>());
        if (!score) continue;
        double sum = std::accumulate(f.prompt_logprobs.begin(), f.prompt_logprobs.end(), 0.0);
        double expected = one["prompt_logprob"];
        CHECK(std::abs(sum - expected) <= 0.02 * std::abs(expected));
    }
    CHECK(e.cache.free() == e.cache.blocks());
}

// The device of an engine; engines make no other one here.
Full& device_of(const Engine& e) { return dynamic_cast<Full&>(*e.device); }

// Whether decodes of few rows are streamed here; where they are not, a line says so.
bool streamed(const Device& device) {
    const bool yes = device.served.at("decode_step").starts_with("stream");
    if (!yes) MESSAGE("skipped: ", device.note);
    return yes;
}

// The device's memory: what is free, and all of it.
std::pair<size_t, size_t> memory() {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "test");
    return {free, total};
}

// What a block's threads get from each other; sets bits of wrong where it is not right.
__global__ void try_block(int* wrong) {
    extern __shared__ __align__(16) char scratch[];
    Block team(scratch);
    const int n = team.size, r = team.rank, all = n * (n - 1) / 2;
    auto right = [&](int bit, bool ok) {
        if (!ok) atomicOr(wrong, 1 << bit);
    };
    right(0, team.sum(float(r)) == float(all));
    right(1, team.max(float(r * 7 % n)) == float(n - 1));
    right(2, team.max(-float(r) - 5) == -5);
    uint64_t total, before = team.before(uint64_t(r) << 33, total);
    right(3, before == uint64_t(r * (r - 1) / 2) << 33 && total == uint64_t(all) << 33);
    for (int size = 1; size <= 32; size *= 2) {
        Lanes lanes = team.group(size);
        int first = r / size * size;
        right(4, lanes.rank == r % size && lanes.size == size);
        right(5, lanes.index == r / size && lanes.count == n / size);
        right(6, lanes.sum(float(r)) == float(size * first + size * (size - 1) / 2));
        right(7, lanes.max(float(r)) == float(first + size - 1) && lanes.max(-r) == -first);
    }
    auto& number = *(uint64_t*)scratch;
    if (r == 0) number = 5;
    team.barrier();
    team.add(number, (uint64_t(r) << 20) + 0xFFFFFFFF);  // the lower halves carry
    team.barrier();
    right(8, number == 5 + (uint64_t(all) << 20) + n * 0xFFFFFFFFull);
}

// Draws by the cluster and by one block; tells of the first cases that are wrong, and returns how many
// are.
int try_draws(const std::vector<float>& logits, int V, const std::vector<DrawKey>& keys) {
    const int draws = int(keys.size());
    OnDevice<cuda::DrawScratch> scratch(std::vector(draws, cuda::DrawScratch{}));
    OnDevice<float> on_device(logits);
    OnDevice<DrawKey> device_keys(keys);
    const std::vector<int> none(draws, -1);
    OnDevice<int> of_cluster(none), of_block(none), host(none), host_of_block(none);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    // clusters are Hopper's
    const int blocks = cuda::runs_hopper_code((const void*)cuda::draw_ids) ? cuda::kDrawBlocks : 1;
    cluster.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config = {dim3(draws * blocks), dim3(cuda::kDrawThreads), 0, nullptr,
                                 &cluster, unsigned(blocks > 1)};
    const DrawKey* these = device_keys.data;
    const float* those = on_device.data;
    check(cudaLaunchKernelEx(&config, cuda::draw_ids, these, scratch.data, those, V, blocks,
                             of_cluster.data, host.data), "draw_ids");
    on_blocks<<<draws, DrawIds::kThreads, kDrawScratch>>>(
        DrawIds{these, those, V, of_block.data, host_of_block.data});
    wait_for_all();
    const auto clusters = of_cluster.get(draws), singles = of_block.get(draws);
    CHECK(host.get(draws) == clusters);
    CHECK(host_of_block.get(draws) == singles);
    int wrong = 0;
    for (int i = 0; i < draws; i++) {
        const DrawKey& key = keys[i];
        const std::span<const float> row(&logits[size_t(key.row) * V], V);
        const int expected = sample_id(row, key.sampling, key.sample, key.position);
        if (clusters[i] == expected && singles[i] == expected) continue;
        if (wrong++ == 0)
            MESSAGE(V, " logits, draw ", i, ", k ", key.sampling.top_k, " p ", key.sampling.top_p,
                    " m ", key.sampling.min_p, " t ", key.sampling.temperature, ": cluster ",
                    clusters[i], ", block ", singles[i], ", not ", expected);
    }
    return wrong;
}

// Logits, with ties or without, and keys that ask for all kinds of draws from them.
int try_random_draws(std::mt19937& random, int draws, int V, int position) {
    std::vector<float> logits(size_t(draws) * V);
    std::normal_distribution<float> normal(0, 0.1f + float(random() % 5));
    const bool ties = random() % 3 == 0;
    for (float& l : logits) l = ties ? std::round(normal(random) * 2) / 2 : normal(random);
    std::vector<DrawKey> keys(draws);
    for (int i = 0; i < draws; i++) {
        Sampling s;
        s.temperature = random() % 5 == 0 ? 0 : 0.1f + float(random() % 20) / 10.0f;
        s.top_k = random() % 3 == 0 ? 0 : 1 + int(random() % (random() % 2 ? 50 : V));
        s.top_p = random() % 3 == 0 ? 1 : float(1 + random() % 999) / 1000.0f;
        s.min_p = random() % 3 == 0 ? float(random() % 1000) / 1000.0f : 0;
        s.seed = random();
        keys[i] = {s, i, int(random() % 8), position};
    }
    return try_draws(logits, V, keys);
}

}  // namespace

TEST_CASE("gpu: a block's sums, maxima and groups") {
    for (int threads : {32, 128, 512, 1024}) {
        OnDevice<int> wrong(std::vector<int>(1));
        try_block<<<1, threads, 16>>>(wrong.data);
        check(cudaDeviceSynchronize(), "try_block");
        CAPTURE(threads);
        CHECK(wrong.get(1)[0] == 0);
    }
}

TEST_CASE("gpu: a block and a cluster draw what one thread draws, for 10,000 cases") {
    std::mt19937 random(1);
    const int draws = 16;
    int wrong = 0, cases = 0;
    for (int round = 0; round < 640; round++, cases += draws) {
        const int sizes[] = {151936, 1000 + int(random() % 5000), 1 + int(random() % 300)};
        wrong += try_random_draws(random, draws, sizes[round % 3], round);
    }
    CHECK(cases >= 10000);
    CHECK(wrong == 0);
}

TEST_CASE("gpu: chapters are those that the tests know") {
    Model m = random_model("Llama", 64, 64, 1, 1, 64);
    CHECK(Opened(m, 1, 1, 1).chapters == kChapters);
    const Opened off(m, 1, 1, 1, {"all"});
    for (const string& name : kChapters) CHECK(!off.on(name));
    for (const string& name : kChapters) {
        vector<string> on = {name};
        if (name == "shared-prefix") on = {name, "decode-attention", "prefill-attention"};
        const Opened one(m, 1, 1, 1, all_but(on));
        CAPTURE(one.note);
        CHECK(one.on(name) == one.note.empty());
    }
}

TEST_CASE("gpu: op by op, the GPU against the CPU, and each chapter against the plain ops") {
    const struct { const char* family; int D, F, H, KV, HD; } models[] = {
        {"Llama", 64, 128, 1, 1, 64}, {"Qwen3", 256, 512, 4, 2, 64}, {"Llama", 576, 1536, 9, 3, 64},
        {"Qwen2", 896, 4864, 14, 2, 64}, {"Qwen3", 1024, 3072, 16, 8, 128},
        {"Qwen2", 96, 160, 2, 1, 64},     // multiples of 32, which few_rows asks for
        {"Qwen3", 80, 208, 1, 1, 128}};   // and of no more than 16
    Comparison plain, few, full;
    for (const auto& [family, D, F, H, KV, HD] : models) {
        Model m = random_model(family, D, F, H, KV, HD);
        OnCpu cpu(m, 1000, 1, 63, {"all"});
        Opened gpu(m, 1000, 1, 63, {"all"}), with_few_rows(m, 1000, 1, 63, all_but({"few-rows"}));
        Opened with_all(m, 1000, 1, 63);
        for (int T : {1, 2, 3, 7, 8, 9, 17, 255, 1000}) {
            INFO("the GPU against the CPU");
            compare_elements(cpu, gpu, T, plain);
            compare_products(m, cpu, gpu, T, plain);
        }
        for (int T : {1, 2, 3, 7, 8, 9}) {
            INFO("few-rows against the plain ops");
            compare_products(m, gpu, with_few_rows, T, few);
        }
        for (int T : {1, 5, 255}) {
            INFO("all chapters against the plain ops");
            compare_products(m, gpu, with_all, T, full);
        }
    }
}

// Contexts up to 10,000 tokens.
TEST_CASE("gpu: attention, the GPU against the CPU, and each chapter against the plain op") {
    const struct { int G, KV, HD; } shapes[] = {
        {1, 8, 64}, {2, 4, 64}, {3, 3, 64}, {4, 2, 64}, {7, 2, 64}, {8, 1, 64},
        {1, 8, 128}, {2, 4, 128}, {3, 3, 128}, {4, 2, 128}, {7, 2, 128}, {8, 1, 128},
        {3, 2, 96}, {4, 1, 256}, {16, 1, 64}, {16, 1, 128}};  // these are for the plain op alone
    Comparison plain, chapters;
    std::mt19937 random(3);
    for (const auto& [G, KV, HD] : shapes) {
        std::vector<int> contexts = {2000, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000};
        if (G == 3 || G == 8) contexts[0] = 10000;
        while (contexts.size() < 40) contexts.push_back(1 + int(random() % 100));
        const Texts texts(contexts, 1000);
        const char* family = std::array{"Llama", "Qwen2", "Qwen3"}[(G + HD / 64) % 3];
        Model m = random_model(family, 64, 64, G * KV, KV, HD);
        Opened gpu(m, 5000, 40, texts.blocks, {"all"});
        {
            INFO("the GPU against the CPU");
            OnCpu cpu(m, 5000, 40, texts.blocks, {"all"});
            compare_attention(m, cpu, gpu, texts, 1000, 2000, true, plain);
        }
        if (cuda::DecodeAttention<CudaDevice>::not_for(gpu.c)[0]) continue;
        for (const vector<string>& on : {vector<string>{"decode-attention"}, {"prefill-attention"},
                                         {"decode-attention", "prefill-attention", "shared-prefix"}}) {
            INFO("against the plain op: ", listed(on));
            Opened other(m, 5000, 40, texts.blocks, all_but(on));
            for (const string& name : on) CHECK(other.on(name));
            compare_attention(m, gpu, other, texts, 1000, INT_MAX, true, chapters);
        }
    }
}

TEST_CASE("gpu: golden logits, and golden ids behind golden ids") {
    for (const std::string& name : kTiny) for (const char* without : {"", "all"}) {
        CAPTURE(name);
        CAPTURE(without);
        Model m(kData + "models/" + name);
        Opened gpu(m, Opened::kLogitRows - 1, 1, 16, {without});
        const size_t V = m.config.vocab;
        double largest = 0;
        for (const json& one : golden("models/" + name + "/golden.json")) {
            std::vector<int> prompt = one["prompt"], ids = one["greedy"];
            size_t last = prompt.size() - 1;
            std::vector<float> ours = all_logits(gpu, prompt);
            ours.erase(ours.begin(), ours.begin() + last * V);
            double error = relative_errors(ours, one["last_logits"], 1).first;
            CAPTURE(last);
            CHECK(error <= std::max(4e-2, 1.5 * double(one["bf16_err"])));  // of transformers
            largest = std::max(largest, error);

            prompt.insert(prompt.end(), ids.begin(), ids.end());
            ours = all_logits(gpu, prompt);
            for (size_t i = 0; i < ids.size(); i++)
                if (one["margin"][i] > 2.0) CHECK(argmax({&ours[(last + i) * V], V}) == ids[i]);
        }
        MESSAGE(name, " without ", without, ": largest error of the last logits ", largest);
    }
}

// With all chapters, without each of them, without any; in a batch, without graphs, in chunks, scored.
TEST_CASE("gpu: golden models, in a batch, in chunks, with graphs and without, whatever is off") {
    vector<vector<string>> switched_off = {{}, {"all"}};
    for (const string& chapter : kChapters) switched_off.push_back({chapter});
    for (const std::string& name : kTiny) {
        Model m(kData + "models/" + name);
        const json all = golden("models/" + name + "/golden.json");
        for (const vector<string>& off : switched_off) for (int variant = 0; variant < 4; variant++) {
            INFO(name, ", without ", listed(off), ", variant ", variant);
            EngineOptions o = on_gpu(200);
            o.graphs = variant != 1, o.chunk = variant == 2 ? 7 : 512, o.without = off;
            check_golden(m, all, o, 24, variant == 3);
        }
    }
}

TEST_CASE("gpu: golden models, streamed") {
    for (const std::string& name : kTiny) for (int rows : {1, 2, 3, 8}) {
        INFO(name, ", rows ", rows);
        EngineOptions o = on_gpu(200);
        o.max_rows = rows, o.graphs = rows != 3;
        Model m(kData + "models/" + name);
        if (!streamed(*Engine(m, o).device)) return;
        check_golden(m, golden("models/" + name + "/golden.json"), o, 24, false);
    }
}

// The logits of a decode step behind contexts of all kinds, streamed and by kernels op by op.
TEST_CASE("gpu: streamed steps against the ops") {
    const struct { const char* family; int D, F, G, KV, HD; } models[] = {
        {"Llama", 64, 64, 1, 1, 64}, {"Qwen3", 192, 320, 2, 4, 128}, {"Qwen2", 576, 1536, 3, 3, 64},
        {"Llama", 1024, 3072, 4, 8, 64}, {"Qwen3", 2112, 4160, 2, 8, 128},
        {"Qwen2", 896, 4864, 7, 2, 64}, {"Llama", 4096, 8192, 8, 1, 128}};
    const Texts texts({5000, 1, 15, 16, 17, 64, 300, 1000}, 16);
    double largest = 0;
    for (const auto& [family, D, F, G, KV, HD] : models) {
        Model m = random_model(family, D, F, G * KV, KV, HD);
        Opened gpu(m, 1000, 8, texts.blocks);
        if (!streamed(gpu)) return;
        const size_t V = m.config.vocab;
        for (int i = 0; i < 8; i++)
            for (int begin = 0; begin < texts.contexts[i]; begin += 1000) {
                Step step;
                add_part(step, texts.tables[i], begin, std::min(texts.contexts[i], begin + 1000));
                const StepArrays s = gpu.lay(step);
                gpu.all([&] { gpu.forward(s); });
            }
        for (int rows : {1, 2, 3, 8, 5}) for (int first : {0, 3, 7}) {
            INFO(family, ", hidden size ", D, ", rows ", rows, ", from ", first);
            Step step;
            for (int i = 0; i < rows; i++) {
                const int text = (first + i) % 8, n = texts.contexts[text];
                add_part(step, texts.tables[text], n, n + 1);
                step.logit_rows.push_back(i);
            }
            const StepArrays s = gpu.lay(step, 0, true);
            REQUIRE(gpu.takes(s));
            gpu.poison();
            gpu.all([&] { gpu.forward(s); });
            auto expected = logits_of(gpu, s, rows);
            expected.resize(rows * V);
            gpu.poison();
            gpu.ready_words(rows);
            gpu.all([&] { CHECK(gpu.decode_step(s)); });
            auto [error, worst] = relative_errors(gpu.get(gpu.logits, rows * V), expected, rows);
            CHECK(error < 2e-2);
            CHECK(worst < 3e-2);
            largest = std::max(largest, worst);
        }
    }
    MESSAGE("largest error of a row: ", largest);
}

// Words are what no sanitizer checks. Blocks stop here and there for up to 20 us, differently in
// each step; what comes out must not change by a bit.
TEST_CASE("gpu: streamed steps with random delays") {
    Model m = random_model("Qwen3", 512, 1024, 8, 4, 64);
    auto ids = [&](int rows, int tokens, unsigned delays) {
        EngineOptions o = on_gpu(400);
        o.max_context = 12000, o.max_rows = rows;
        Engine e(m, o);
        Full& device = device_of(e);
        if (!streamed(device)) return std::vector<std::vector<int>>();
        (device.*(&Opened::arguments))->delays = delays;
        std::vector<Request> requests;
        for (int i = 0; i < rows; i++) {
            Request& r = requests.emplace_back(greedy({i, 1, 2}, tokens));
            r.ignore_eos = true, r.sampling.temperature = 1, r.sampling.seed = i;
        }
        std::vector<std::vector<int>> all;
        for (auto& [key, f] : run_all(e, requests)) all.push_back(f.ids);
        CHECK(device.*(&Opened::streamed_steps) >= tokens - 8);
        return all;
    };
    // 16 bits of a tag come round after 10,921 steps of two layers
    for (auto [rows, tokens] : {std::pair(1, 11500), {8, 400}, {3, 400}})
        CHECK(ids(rows, tokens, 1234) == ids(rows, tokens, 0));
}

// Few kernels on little memory, for compute-sanitizer: -tc="*sanitizers*".
TEST_CASE("gpu: tiny model, for the sanitizers") {
    Model m(kData + "models/qwen3");
    json all = golden("models/qwen3/golden.json");
    EngineOptions o = on_gpu(4);
    o.graphs = false, o.chunk = 7, o.max_rows = 2;
    SUBCASE("few rows") {}
    SUBCASE("many rows") { o.chunk = 512; }
    SUBCASE("graphs") { o.graphs = true; }
    SUBCASE("many rows, all chapters off") { o.chunk = 512, o.without = {"all"}; }
    check_golden(m, {all[0], all[2]}, o, 8, false);  // no choice of theirs is close
}

// The plain ops one by one, so that none of cuBLAS' kernels is among them.
TEST_CASE("gpu: plain ops, for the sanitizers") {
    const struct { const char* family; int G, KV, HD; } models[] = {
        {"Qwen3", 2, 2, 64}, {"Qwen2", 7, 1, 128}, {"Llama", 1, 1, 256}};
    const Texts texts({60, 1, 15, 16, 17, 33, 30, 31, 32, 5, 6, 40}, 16);
    Comparison compare;
    for (const auto& [family, G, KV, HD] : models) {
        Model m = random_model(family, 64, 64, G * KV, KV, HD);
        OnCpu cpu(m, 250, 16, texts.blocks, {"all"});
        Opened gpu(m, 250, 16, texts.blocks, {"all"});
        compare_elements(cpu, gpu, 3, compare);
        compare_attention(m, cpu, gpu, texts, 16, 60, true, compare);
    }
    std::mt19937 random(1);
    CHECK(try_random_draws(random, 4, 1003, 7) == 0);
}

// What a step of the engine takes beyond its graph alone, launched again and again: if the GPU waits
// for the host, it shows here. Contexts grow, so the graphs are timed before and behind some steps.
// What comes out depends on the machine, so nothing is asked of it but that steps are captured.
TEST_CASE("gpu: no gap between decode steps") {
    Model m("tests/configs/qwen3-0.6b", true);
    for (int rows : {1, 256}) {
        EngineOptions o = on_gpu(0);
        o.kv_memory = size_t(20) << 30, o.max_context = 1024;
        Engine e(m, o);
        Full& device = device_of(e);
        for (int i = 0; i < rows; i++) {
            Request r;
            r.prompt = {i, 1, 2, 3}, r.max_tokens = 1000, r.ignore_eos = true;
            e.add(r);
        }
        int graphs = 0;
        auto graph_seconds = [&] {
            wait_for_all();
            graphs = 0;
            double start = now();
            for (int i = 0; i < 20; i++)
                for (auto& [key, graph] : device.*(&Opened::graphs)) {
                    if (std::get<0>(key) != rows) continue;
                    check(cudaGraphLaunch(graph, device.*(&Opened::stream)), "test");
                    graphs++;
                }
            wait_for_all();
            return (now() - start) / graphs;
        };
        std::vector<double> gaps;
        for (int round = 0; round < 9; round++) {
            for (int i = 0; i < 40; i++) e.step();
            double before = graph_seconds(), start = now();
            for (int i = 0; i < 40; i++) e.step();
            wait_for_all();
            double step = (now() - start) / 40;
            gaps.push_back(1e6 * (step - (before + graph_seconds()) / 2));
        }
        CHECK(graphs == 40);  // one for each buffer: every step is one of them
        std::ranges::sort(gaps);
        MESSAGE(rows, " rows: gap of ", gaps[4], " us (", gaps[0], " to ", gaps[8], ")");
    }
}

TEST_CASE("gpu: demo model: perplexity") {
    if (!std::filesystem::exists(kDemo + "/config.json")) {
        MESSAGE("skipped: no demo model here");
        return;
    }
    Model m(kDemo);
    Request r = greedy(Tokenizer(kDemo).encode(read_file(kData + "smollm2/perplexity.txt")), 1);
    r.score_prompt = true;
    Engine e(m, on_gpu(200));
    std::vector<double> each = run_one(e, r).prompt_logprobs;
    double sum = std::accumulate(each.begin(), each.end(), 0.0);
    double perplexity = std::exp(-sum / double(each.size()));
    double expected = golden("smollm2/perplexity.json")["perplexity"];
    MESSAGE("perplexity ", perplexity, ", expected ", expected);
    CHECK(std::abs(perplexity / expected - 1) < 0.005);
}

TEST_CASE("gpu: what does not fit is told in a line, and nothing of it stays in memory") {
    Model tiny(kData + "models/qwen3");
    auto works = [&] {
        Engine e(tiny, on_gpu(4));
        return run_one(e, greedy({1, 2, 3}, 4)).ids.size() == 4;
    };
    REQUIRE(works());  // what stays comes now: kernels, cuBLAS
    const size_t before = memory().first;
    // left: how much of the device's memory is not occupied by others; 0: none is
    auto refuse = [&](const Model& m, EngineOptions o, size_t left, const char* says) {
        char* occupied = nullptr;
        if (left) check(cudaMalloc(&occupied, memory().first - left), "test");
        std::string message = error_of([&] { Engine e(m, o); });
        check(cudaFree(occupied), "test");
        CAPTURE(message);
        CHECK(message.find('\n') == std::string::npos);
        CHECK(message.find(says) != std::string::npos);
        double kept = (double(before) - double(memory().first)) / (1 << 20);
        CHECK(kept < 16);
        CHECK(works());
    };
    SUBCASE("KV memory") {  // blocks of 1 MiB, so that 1 TiB are not too many for the host
        Model m = random_model("Llama", 64, 64, 64, 64, 128);
        EngineOptions o = on_gpu(200);
        o.kv_memory = size_t(1) << 40;  // more than the machine has, or at least the GPU
        refuse(m, o, 0, "--kv-memory");
        o.kv_memory = memory().second + (size_t(1) << 30);  // only the GPU
        if (o.kv_memory < physical_memory()) refuse(m, o, 0, "GPU: ");
    }
    SUBCASE("weights") {
        EngineOptions o = on_gpu(4);
        o.chunk = 16, o.max_rows = 16;
        Model m = random_model("Llama", 1024, 32768, 8, 8, 128);  // of 420 MiB
        refuse(m, o, size_t(300) << 20, "MiB do not fit into the ");
    }
    SUBCASE("heads that are too wide") {
        Model m = random_model("Llama", 512, 512, 1, 1, 512);
        refuse(m, on_gpu(4), 0, "head_dim 512 is over 256");
    }
    SUBCASE("a GPU that is not there") {
        int gpus = 0;
        check(cudaGetDeviceCount(&gpus), "test");
        EngineOptions o = on_gpu(4);
        o.device = str("cuda:", std::max(gpus, 7));
        refuse(tiny, o, 0, "no such GPU here");
    }
}
