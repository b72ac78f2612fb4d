// The GPU against the CPU: teams and their draws, each op, whole models; and what does not fit. Run by
// `make test-gpu`.
#include "common.hpp"

namespace {

using namespace cuda;

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

// Floats to and from the device. Its stream does not wait for copies outside of it, nor they for
// the stream: so all is waited for.
template <class T>
void put(T* to, const std::vector<float>& values) {
    std::vector<T> raw(values.begin(), values.end());
    check(cudaMemcpy(to, raw.data(), raw.size() * sizeof(T), cudaMemcpyHostToDevice), "test");
    check(cudaDeviceSynchronize(), "test");
}
template <class T>
std::vector<float> get(const T* from, size_t n) {
    std::vector<T> raw(n);
    check(cudaDeviceSynchronize(), "test");
    check(cudaMemcpy(raw.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost), "test");
    return {raw.begin(), raw.end()};
}

// The device, its ops open.
struct Opened : CudaDevice {
    using CudaDevice::add_linear, CudaDevice::attend, CudaDevice::compute_logits;
    using CudaDevice::forward, CudaDevice::look_up, CudaDevice::norm_linear;
    using CudaDevice::norm_swiglu, CudaDevice::upload, CudaDevice::layers;
    using CudaDevice::graphs, CudaDevice::stream, CudaDevice::streams, CudaDevice::streamed_steps;
    using CudaDevice::ready_words, CudaDevice::stream_rows, CudaDevice::shared_tiles;
    using CudaDevice::x, CudaDevice::qkv, CudaDevice::att, CudaDevice::h, CudaDevice::logits;
    const size_t room;  // in rows; at least one behind those of a step

    Opened(const Model& m, int tokens, int rows, int blocks)
        : CudaDevice(m, 0, tokens + 1, rows, false), room(std::max(tokens + 1, kGraphRows)) {
        reserve(blocks);
        // slots that are not written yet may hold any number; 0x4343 is 195, which would show
        poison(kv, kv_bytes / sizeof(*kv), 0x43);
        share_from = INT_MIN;  // blocks are shared even where it does not pay
    }
    void poison(auto* array, size_t count, int byte) {
        check(cudaDeviceSynchronize(), "test");
        check(cudaMemset(array, byte, count * sizeof(*array)), "test");
        check(cudaDeviceSynchronize(), "test");
    }
    // Whatever ops write becomes NaN, so that it shows if they do not.
    void poison() {
        poison(x, room * c.hidden, 0xFF), poison(normed, room * c.hidden, 0xFF);
        poison(qkv, room * c.qkv(), 0xFF), poison(att, room * c.heads * c.head_dim, 0xFF);
        poison(gate_up, room * 2 * c.intermediate, 0xFF), poison(h, room * c.intermediate, 0xFF);
        poison(logits, size_t(kGraphRows) * c.vocab, 0xFF);
    }
};

// Random numbers of deviation 1, the same in every run, as a T can hold them.
template <class T>
std::vector<float> random_values(size_t n) {
    static uint64_t seed = 0;
    std::vector<float> values(n);
    seed++;
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        int32_t bits = int32_t(philox(seed, 0, uint32_t(i)) >> 32);
        values[i] = float(T(1.732f * float(bits) / 0x1p31f));
    }
    return values;
}

// A model of random weights; so are its norms and biases, which dummy weights leave plain.
Model random_model(const std::string& family, int D, int F, int H, int KV, int HD) {
    TempFolder folder;
    json config = {{"architectures", json::array({family + "ForCausalLM"})}, {"vocab_size", 1003},
        {"hidden_size", D}, {"num_hidden_layers", 2}, {"num_attention_heads", H},
        {"num_key_value_heads", KV}, {"head_dim", HD}, {"intermediate_size", F},
        {"max_position_embeddings", 16384}, {"rope_theta", 10000.0}};
    folder.write("config.json", config.dump());
    Model m(folder.path, true);
    auto vary = [](std::vector<float>& values, float mean) {
        std::vector<float> by = random_values<float>(values.size());
        for (size_t i = 0; i < values.size(); i++) values[i] = mean + 0.3f * by[i];
    };
    vary(m.final_norm, 1);
    for (Layer& l : m.layers) {
        vary(l.attn_norm, 1), vary(l.mlp_norm, 1), vary(l.q_norm, 1), vary(l.k_norm, 1);
        if (m.config.type == "qwen2") vary(l.bias, 0);
    }
    return m;
}

// Puts tokens begin .. end - 1 of one more sequence into a step; all tables are of one width.
void add_part(Step& step, const std::vector<int>& table, int begin, int end) {
    step.table_width = int(table.size());
    int sequence = int(step.tables.size() / table.size());
    for (int i = begin; i < end; i++) {
        step.ids.push_back(i * 7 % 1000);
        step.positions.push_back(i);
        step.sequence.push_back(sequence);
    }
    step.tables.insert(step.tables.end(), table.begin(), table.end());
}

// Calls an op as the CPU's are called: by all threads.
void by_all(auto op) {
    #pragma omp parallel
    op();
}

// From the order in which the CPU keeps rows that it multiplies with weights, and back.
std::vector<float> unpaired(const std::vector<float>& rows, bool back = false) {
    std::vector<float> out(rows.size());
    for (int i = 0; i < int(out.size()); i++)
        back ? out[cpu::paired(i)] = rows[i] : out[i] = rows[cpu::paired(i)];
    return out;
}

// The relative L2 error ||got - expected|| / ||expected|| of all, and that of the worst row.
std::pair<double, double> relative_errors(const std::vector<float>& got,
                                          const std::vector<float>& expected, size_t rows) {
    double error = 0, norm = 0, worst = 0;
    size_t width = got.size() / rows;
    #pragma omp parallel for reduction(+ : error, norm) reduction(max : worst)
    for (size_t row = 0; row < rows; row++) {
        double e = 0, n = 0;
        for (size_t i = row * width; i < (row + 1) * width; i++) {
            e += std::pow(double(got[i]) - expected[i], 2);
            n += std::pow(double(expected[i]), 2);
        }
        error += e, norm += n, worst = std::max(worst, std::sqrt(e / n));
    }
    return {std::sqrt(error / norm), worst};  // the first is NaN if any number is
}

// Compares what ops give; tells the largest errors at the end.
struct Comparison {
    std::map<std::string, std::pair<double, double>> largest;  // by op

    // limit: for the error of all rows. The row behind them must still be poisoned.
    void operator()(const std::string& op, const auto* device, const std::vector<float>& expected,
                    size_t rows, size_t width, double limit) {
        std::vector<float> got = get(device, (rows + 1) * width);
        size_t untouched = std::count_if(got.end() - width, got.end(), [](float f) {
            return std::isnan(f);
        });
        got.resize(rows * width);
        auto [error, worst] = relative_errors(got, expected, rows);
        INFO(op, ", rows ", rows);
        CHECK(error < limit);
        CHECK(worst < 3e-2);
        CHECK(untouched == width);
        auto& [all, row] = largest[op];
        all = std::max(all, error), row = std::max(row, worst);
    }
    ~Comparison() {
        for (auto& [op, errors] : largest)
            MESSAGE(op, ": largest error ", errors.first, ", of a row ", errors.second);
    }
};

// The logits of all positions of a prompt, which is computed in one step.
std::vector<float> all_logits(Opened& gpu, const std::vector<int>& prompt, size_t vocab) {
    int T = int(prompt.size());
    std::vector<int> table(Cache::blocks_for(T));
    std::iota(table.rbegin(), table.rend(), 0);
    Step step;
    add_part(step, table, 0, T);
    step.ids = prompt;
    step.logit_rows = step.positions;
    gpu.poison();
    auto [arrays, decodes, tiles] = gpu.upload(step, T);
    gpu.forward(arrays, T, decodes, tiles);
    gpu.compute_logits(arrays.logit_rows, T);
    return get(gpu.logits, T * vocab);
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

// The device's memory: what is free, and all of it.
std::pair<size_t, size_t> memory() {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "test");
    return {free, total};
}

// Draws an id for each key by a team of one block.
__global__ void __launch_bounds__(1024)
draw_by_block(const DrawKey* keys, const float* logits, int V, int* drawn) {
    extern __shared__ __align__(16) char scratch[];
    Block team(scratch);
    const DrawKey& key = keys[blockIdx.x];
    int id = draw_id(team, logits + size_t(key.row) * V, V, key.sampling, key.sample, key.position);
    if (id >= 0) drawn[blockIdx.x] = id;
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
    OnDevice<DrawScratch> scratch(std::vector<DrawScratch>(draws, DrawScratch{}));
    OnDevice<int> drawn((std::vector<int>(draws)));
    int wrong = 0, cases = 0;
    for (int round = 0; round < 640; round++) {
        const int sizes[] = {151936, 1000 + int(random() % 5000), 1 + int(random() % 300)};
        const int V = sizes[round % 3];
        std::vector<float> logits(size_t(draws) * V);
        std::normal_distribution<float> normal(0, 0.1f + random() % 5);
        bool ties = random() % 3 == 0;
        for (float& l : logits) l = ties ? std::round(normal(random) * 2) / 2 : normal(random);
        std::vector<DrawKey> keys(draws);
        std::vector<int> expected(draws);
        for (int i = 0; i < draws; i++) {
            Sampling s;
            s.temperature = random() % 5 == 0 ? 0 : 0.1f + (random() % 20) / 10.0f;
            s.top_k = random() % 3 == 0 ? 0 : 1 + random() % (random() % 2 ? 50 : V);
            s.top_p = random() % 3 == 0 ? 1 : (1 + random() % 999) / 1000.0f;
            s.min_p = random() % 3 == 0 ? (random() % 1000) / 1000.0f : 0;
            s.seed = random();
            keys[i] = {s, i, int(random() % 8), round};
            std::span<const float> row(&logits[size_t(i) * V], V);
            expected[i] = sample_id(row, s, keys[i].sample, keys[i].position);
        }
        OnDevice<float> on_device(logits);
        OnDevice<DrawKey> device_keys(keys);
        OnDevice<int> host((std::vector<int>(draws)));
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cudaFuncAttributes code;
        check(cudaFuncGetAttributes(&code, draw_ids), "draw_ids");
        const int blocks = code.ptxVersion >= 90 ? kDrawBlocks : 1;  // clusters are Hopper's
        cluster.val.clusterDim = {unsigned(blocks), 1, 1};
        cudaLaunchConfig_t config = {unsigned(draws * blocks), kDrawThreads, 0, nullptr, &cluster,
                                     blocks > 1};
        const DrawKey* these = device_keys.data;
        const float* those = on_device.data;
        check(cudaLaunchKernelEx(&config, draw_ids, these, scratch.data, those, V, blocks,
                                 drawn.data, host.data), "draw_ids");
        check(cudaDeviceSynchronize(), "sample");
        OnDevice<int> by_block(std::vector<int>(draws, -1));
        draw_by_block<<<draws, 1024, kDrawScratch>>>(these, those, V, by_block.data);
        check(cudaDeviceSynchronize(), "draw_by_block");
        auto of_cluster = drawn.get(draws), of_block = by_block.get(draws);
        for (int i = 0; i < draws; i++) {
            cases++;
            if (of_cluster[i] == expected[i] && of_block[i] == expected[i]) continue;
            if (wrong++ < 10)
                MESSAGE(V, " draw ", i, ", ties ", ties, " k ", keys[i].sampling.top_k, " p ",
                        keys[i].sampling.top_p, " m ", keys[i].sampling.min_p, " t ",
                        keys[i].sampling.temperature, ": cluster ", of_cluster[i], ", block ",
                        of_block[i], ", not ", expected[i]);
        }
    }
    CHECK(cases >= 10000);
    CHECK(wrong == 0);
}

TEST_CASE("gpu: ops, each against the CPU's") {
    const struct { const char* family; int D, F, H, KV, HD; } models[] = {
        {"Llama", 64, 128, 1, 1, 64}, {"Qwen3", 256, 512, 4, 2, 64}, {"Llama", 576, 1536, 9, 3, 64},
        {"Qwen2", 896, 4864, 14, 2, 64}, {"Qwen3", 1024, 3072, 16, 8, 128},
        {"Qwen2", 96, 160, 2, 1, 64},     // multiples of 32, which few_rows asks for
        {"Qwen3", 80, 208, 1, 1, 128}};   // and of no more than 16
    Comparison compare;
    std::mt19937 random(2);
    for (const auto& [family, D, F, H, KV, HD] : models) {
        Model m = random_model(family, D, F, H, KV, HD);
        Opened gpu(m, 1000, 1, 1);
        Activations a(m.config, 1000);
        const Layer& l = m.layers[1];
        const DeviceLayer& d = gpu.layers[1];
        const int N = m.config.qkv_dim(), V = m.config.vocab;
        INFO(family, ", hidden size ", D);
        for (int T : {1, 2, 3, 7, 8, 9, 17, 255, 1000}) {
            Step step;
            add_part(step, {0}, 0, T);
            for (int i = 0; i < std::min(T, kGraphRows - 1); i++)
                step.logit_rows.push_back(int(random() % T));
            auto arrays = gpu.upload(step, T).arrays;
            auto set_x = [&, D = D] {
                std::vector<float> x = random_values<float>(size_t(T) * D);
                gpu.poison();
                put(gpu.x, x);
                std::ranges::copy(x, a.x.begin());
            };

            gpu.poison();
            by_all([&] { cpu::embed(m, step, a); });
            gpu.look_up(arrays, T);
            compare("embed", gpu.x, a.x, T, D, 1e-9);  // exact

            set_x();
            Layer unbiased = l;  // on the GPU, biases are attend's
            std::ranges::fill(unbiased.bias, 0);
            by_all([&] { cpu::norm_linear(m, unbiased, step, a); });
            gpu.norm_linear<Into::values>(T, nullptr, d.attn_norm, d.qkv, N, gpu.qkv);
            compare("norm_linear", gpu.qkv, a.qkv, T, N, 1e-2);

            auto add = [&](const char* name, b16* in, const Matrix& w, const b16* device_w) {
                set_x();
                auto values = random_values<b16>(size_t(T) * w.cols);
                auto ordered = unpaired(values, true);
                put(in, values);
                by_all([&] { cpu::add_linear(ordered, w, step, a); });
                gpu.add_linear(T, in, device_w, w.cols);
                compare(name, gpu.x, a.x, T, w.rows, 1e-3);  // only the order of sums differs
            };
            add("add_linear, attention's", gpu.att, l.o, d.o);
            add("add_linear, the MLP's", gpu.h, l.down, d.down);

            set_x();
            by_all([&] { cpu::norm_swiglu(m, l, step, a); });
            gpu.norm_swiglu(T, d);
            compare("norm_swiglu", gpu.h, unpaired(a.h), T, F, 1e-2);

            set_x();
            std::vector<float> expected;
            auto rows = std::span(step.logit_rows);
            for (size_t i = 0; i < rows.size(); i += kLogitRows) {
                auto part = rows.subspan(i, std::min<size_t>(kLogitRows, rows.size() - i));
                by_all([&] { cpu::logits(m, part, a); });
                auto begin = a.logits.begin();
                expected.insert(expected.end(), begin, begin + part.size() * V);
            }
            gpu.compute_logits(arrays.logit_rows, int(rows.size()));
            compare("logits", gpu.logits, expected, rows.size(), V, 4e-3);
        }
    }
}

// Contexts are built up as prompts on both devices. Then all sequences go on behind their contexts,
// in chunks and in decodes: each time anew, over what was written there the time before.
TEST_CASE("gpu: attention against the CPU's, over contexts, chunks and heads") {
    const struct { int G, KV; } heads[] = {{1, 8}, {2, 4}, {3, 3}, {4, 2}, {7, 2}, {8, 1}};
    const int kTokens = 5000, kBlocks = 3500, kLayer = 1;
    Comparison compare;
    std::mt19937 random(3);
    for (int HD : {64, 128}) for (const auto [G, KV] : heads) {
        std::vector<int> contexts = {2000, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000};
        if (G == 3 || G == 8) contexts[0] = 10000;
        while (contexts.size() < 40) contexts.push_back(1 + int(random() % 100));
        std::vector<int> blocks(kBlocks);
        std::iota(blocks.begin(), blocks.end(), 0);
        std::ranges::shuffle(blocks, random);
        std::vector<std::vector<int>> tables;
        for (int n : contexts) {
            auto& table = tables.emplace_back(Cache::blocks_for(contexts[0] + 1000));
            for (int i = 0; i < Cache::blocks_for(n + 1000); i++, blocks.pop_back())
                table[i] = blocks.back();
            REQUIRE(!blocks.empty());
        }
        const char* family = std::array{"Llama", "Qwen2", "Qwen3"}[(G + HD / 64) % 3];
        Model m = random_model(family, 64, 64, G * KV, KV, HD);
        Opened gpu(m, kTokens, 40, kBlocks);
        Activations a(m.config, kTokens);
        KvMemory kv(m.config, kBlocks);
        const int Q = m.config.q_dim(), N = m.config.qkv_dim(), group = G;
        INFO(family, ", head_dim ", HD, ", query heads of a kv head ", group);

        // padded: rows that kernels are launched for, where the step is captured; else 0
        auto attend = [&](const char* name, Step& step, int padded) {
            int T = step.tokens();
            REQUIRE(T <= kTokens);
            std::vector<float> qkv = random_values<b16>(size_t(T) * N);
            const std::vector<float>& bias = m.layers[kLayer].bias;
            #pragma omp parallel for
            for (int t = 0; t < T; t++) {
                float *q = &qkv[size_t(t) * N], *k = q + Q;
                // a token likes itself best, so that it shows in long contexts, too
                for (int i = 0; i < Q; i++)
                    q[i] = float(b16(q[i] + 0.4f * k[i / HD / group * HD + i % HD]));
                for (int i = 0; i < N; i++) a.qkv[size_t(t) * N + i] = q[i] + bias[i];
            }
            gpu.poison();
            put(gpu.qkv, qkv);
            by_all([&] { cpu::embed(m, step, a); });  // for the angles
            by_all([&] { cpu::attend(m, kLayer, step, a, kv); });
            auto [arrays, decodes, tiles] = gpu.upload(step, std::max(T, padded));
            gpu.look_up(arrays, T);  // the angles, too
            if (padded) gpu.attend(arrays, kLayer, padded, padded, tiles ? gpu.shared_tiles() : 0);
            else gpu.attend(arrays, kLayer, T, decodes, tiles);
            compare(name, gpu.att, unpaired(a.att), T, Q, 1e-2);
            return tiles;
        };
        for (int begin = 0; begin < contexts[0]; begin += 1000) {
            Step step;
            for (int i = 0; i < 40; i++)
                if (begin < contexts[i])
                    add_part(step, tables[i], begin, std::min(contexts[i], begin + 1000));
            attend("attend, contexts", step, 0);
        }
        const int counts[] = {1, 2, 5, 64, 100, 129, 1000};
        for (int round = 0; round < 7; round++) {
            Step step;
            for (int i = 0; i < 40; i++) {
                int count = i < 12 ? counts[(i + round) % 7] : 1;
                add_part(step, tables[i], contexts[i], contexts[i] + count);
            }
            attend("attend, chunks beside decodes", step, 0);
        }
        for (int n : {1, 3, 12, 40}) {
            Step step;
            for (int i = 0; i < n; i++) add_part(step, tables[i], contexts[i], contexts[i] + 1);
            attend("attend, decodes", step, 0);
            attend("attend, decodes as captured", step, (n + 15) / 16 * 16);
        }
        // of three, one has a context of its own, the others begin with the blocks of one of two
        for (int count : {1, 300}) {
            Step step;
            for (int i = 0; i < 40; i++) {
                const int pages = std::array{0, 120, 40}[i % 3];
                const auto& from = tables[i % 3 == 1 ? 0 : 11];
                std::vector<int> table(from.begin(), from.begin() + pages);
                table.insert(table.end(), tables[i].begin(), tables[i].end());
                table.resize(tables[0].size() + 120);
                int n = i % 3 ? 1 + contexts[i] % 120 + pages * kBlockSize : contexts[i];
                add_part(step, table, n, n + (i == 5 ? count : 1));
            }
            CHECK(attend("attend, decodes that share blocks", step, 0) >= 1 + count / 300);
            if (count == 1) attend("attend, shared as captured", step, 48);
        }
    }
}

TEST_CASE("gpu: golden logits, and golden ids behind golden ids") {
    for (const std::string& name : kTiny) {
        CAPTURE(name);
        Model m(kData + "models/" + name);
        Opened gpu(m, kGraphRows - 1, 1, 16);
        const size_t V = m.config.vocab;
        double largest = 0;
        for (const json& one : golden("models/" + name + "/golden.json")) {
            std::vector<int> prompt = one["prompt"], ids = one["greedy"];
            size_t last = prompt.size() - 1;
            std::vector<float> ours = all_logits(gpu, prompt, V);
            ours.erase(ours.begin(), ours.begin() + last * V);
            double error = relative_errors(ours, one["last_logits"], 1).first;
            CAPTURE(last);
            CHECK(error <= std::max(4e-2, 1.5 * double(one["bf16_err"])));  // of transformers
            largest = std::max(largest, error);

            prompt.insert(prompt.end(), ids.begin(), ids.end());
            ours = all_logits(gpu, prompt, V);
            for (size_t i = 0; i < ids.size(); i++)
                if (one["margin"][i] > 2.0) CHECK(argmax({&ours[(last + i) * V], V}) == ids[i]);
        }
        MESSAGE(name, ": largest error of the last logits ", largest);
    }
}

TEST_CASE("gpu: golden models, in a batch, in chunks, with graphs and without") {
    for (const std::string& name : kTiny) for (int variant = 0; variant < 4; variant++) {
        INFO(name, ", variant ", variant);
        EngineOptions o = on_gpu(200);
        o.graphs = variant != 1, o.chunk = variant == 2 ? 7 : 512;
        Model m(kData + "models/" + name);
        check_golden(m, golden("models/" + name + "/golden.json"), o, 24, variant == 3);
    }
}

// Whether decodes of few rows are streamed here; where they are not, a line says so.
bool streamed(const CudaDevice& device) {
    bool yes = bool(device.*(&Opened::streams));
    if (!yes) MESSAGE("skipped: ", device.note);
    return yes;
}

TEST_CASE("gpu: golden models, streamed") {
    for (const std::string& name : kTiny) for (int rows : {1, 2, 3, 8}) {
        INFO(name, ", rows ", rows);
        EngineOptions o = on_gpu(200);
        o.max_rows = rows, o.graphs = rows != 3;
        Model m(kData + "models/" + name);
        if (!streamed(static_cast<CudaDevice&>(*Engine(m, o).device))) return;
        check_golden(m, golden("models/" + name + "/golden.json"), o, 24, false);
    }
}

// The logits of a decode step behind contexts of all kinds, streamed and by kernels op by op.
TEST_CASE("gpu: streamed steps against the ops") {
    const struct { const char* family; int D, F, G, KV, HD; } models[] = {
        {"Llama", 64, 64, 1, 1, 64}, {"Qwen3", 192, 320, 2, 4, 128}, {"Qwen2", 576, 1536, 3, 3, 64},
        {"Llama", 1024, 3072, 4, 8, 64}, {"Qwen3", 2112, 4160, 2, 8, 128},
        {"Qwen2", 896, 4864, 7, 2, 64}, {"Llama", 4096, 8192, 8, 1, 128}};
    const int contexts[] = {5000, 1, 15, 16, 17, 64, 300, 1000};
    std::mt19937 random(4);
    double largest = 0;
    for (const auto& [family, D, F, G, KV, HD] : models) {
        Model m = random_model(family, D, F, G * KV, KV, HD);
        Opened gpu(m, 1000, 8, 8 * 320);
        if (!streamed(gpu)) return;
        const size_t V = m.config.vocab;
        std::vector<int> blocks(8 * 320);
        std::iota(blocks.begin(), blocks.end(), 0);
        std::ranges::shuffle(blocks, random);
        auto table = [&](int i) {
            return std::vector<int>(blocks.begin() + 320 * i, blocks.begin() + 320 * (i + 1));
        };
        for (int i = 0; i < 8; i++)
            for (int begin = 0; begin < contexts[i]; begin += 1000) {
                Step step;
                add_part(step, table(i), begin, std::min(contexts[i], begin + 1000));
                auto [arrays, decodes, tiles] = gpu.upload(step, step.tokens());
                gpu.forward(arrays, step.tokens(), decodes, tiles);
                check(cudaDeviceSynchronize(), "test");  // before its arrays are written anew
            }
        for (int rows : {1, 2, 3, 8, 5}) for (int first : {0, 3, 7}) {
            INFO(family, ", hidden size ", D, ", rows ", rows, ", from ", first);
            Step step;
            for (int i = 0; i < rows; i++) {
                int c = (first + i) % 8;
                add_part(step, table(c), contexts[c], contexts[c] + 1);
                step.logit_rows.push_back(i);
            }
            auto [arrays, decodes, tiles] = gpu.upload(step, rows);
            gpu.poison();
            gpu.forward(arrays, rows, decodes, tiles);
            gpu.compute_logits(arrays.logit_rows, rows);
            auto expected = get(gpu.logits, rows * V);
            gpu.poison();
            gpu.ready_words(rows);
            gpu.stream_rows(arrays, rows);
            auto [error, worst] = relative_errors(get(gpu.logits, rows * V), expected, rows);
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
        auto& device = static_cast<CudaDevice&>(*e.device);
        if (!streamed(device)) return std::vector<std::vector<int>>();
        (device.*(&Opened::streams))->delays = delays;
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
    check_golden(m, {all[0], all[2]}, o, 8, false);  // no choice of theirs is close
}

// What a step of the engine takes beyond its graph alone, launched again and again: if the GPU waits
// for the host, it shows here. Contexts grow, so the graphs are timed before and behind some steps.
TEST_CASE("gpu: no gap between decode steps") {
    Model m("tests/configs/qwen3-0.6b", true);
    for (int rows : {1, 256}) {
        EngineOptions o = on_gpu(0);
        o.kv_memory = size_t(20) << 30, o.max_context = 1024;
        Engine e(m, o);
        auto& device = static_cast<CudaDevice&>(*e.device);
        for (int i = 0; i < rows; i++) {
            Request r;
            r.prompt = {i, 1, 2, 3}, r.max_tokens = 1000, r.ignore_eos = true;
            e.add(r);
        }
        auto graph_seconds = [&] {
            check(cudaDeviceSynchronize(), "test");
            double start = now();
            for (int i = 0; i < 20; i++)
                for (auto& [key, graph] : device.*(&Opened::graphs))
                    if (std::get<0>(key) == rows)
                        check(cudaGraphLaunch(graph, device.*(&Opened::stream)), "test");
            check(cudaDeviceSynchronize(), "test");
            return (now() - start) / 40;
        };
        std::vector<double> gaps;
        for (int round = 0; round < 9; round++) {
            for (int i = 0; i < 40; i++) e.step();
            double before = graph_seconds(), start = now();
            for (int i = 0; i < 40; i++) e.step();
            check(cudaDeviceSynchronize(), "test");
            double step = (now() - start) / 40;
            gaps.push_back(1e6 * (step - (before + graph_seconds()) / 2));
        }
        std::ranges::sort(gaps);
        MESSAGE(rows, " rows: gap of ", gaps[4], " us (", gaps[0], " to ", gaps[8], ")");
        CHECK(gaps[4] < 20);
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
    SUBCASE("a GPU that is not there") {
        int gpus = 0;
        check(cudaGetDeviceCount(&gpus), "test");
        EngineOptions o = on_gpu(4);
        o.device = str("cuda:", std::max(gpus, 7));
        refuse(tiny, o, 0, "no such GPU here");
    }
}
