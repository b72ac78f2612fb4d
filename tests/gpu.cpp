// The GPU against the CPU: the draw, whole models, attention over shapes. Run by `make test-gpu`.
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

// Log-probabilities of all prompts' ids, and of what is generated behind them, on one device.
std::vector<std::vector<double>> logprobs_on(const Model& m, EngineOptions o,
                                             const std::vector<std::vector<int>>& prompts) {
    o.kv_memory = 200 << 20;
    Engine e(m, o);
    std::vector<std::vector<double>> all(prompts.size());
    for (const auto& p : prompts) {
        Request r;
        r.prompt = p, r.max_tokens = 1, r.score_prompt = true;
        e.add(r);
    }
    while (e.busy())
        for (Output& out : e.step()) all[out.request] = out.prompt_logprobs;
    return all;
}

}  // namespace

TEST_CASE("gpu: the sampler draws what the plain one draws, for 10,000 cases") {
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
        cluster.val.clusterDim = {kDrawBlocks, 1, 1};
        cudaLaunchConfig_t config = {draws * kDrawBlocks, kDrawThreads, 0, nullptr, &cluster, 1};
        const DrawKey* these = device_keys.data;
        const float* those = on_device.data;
        check(cudaLaunchKernelEx(&config, draw_ids, these, scratch.data, those, V, kDrawBlocks,
                                 drawn.data, host.data), "draw_ids");
        check(cudaDeviceSynchronize(), "sample");
        auto ids = drawn.get(draws);
        for (int i = 0; i < draws; i++) {
            cases++;
            if (ids[i] != expected[i] && wrong++ < 10)
                MESSAGE(V, " draw ", i, ", ties ", ties, " k ", keys[i].sampling.top_k, " p ",
                        keys[i].sampling.top_p, " m ", keys[i].sampling.min_p, " t ",
                        keys[i].sampling.temperature, ": ", ids[i], " not ", expected[i]);
        }
    }
    CHECK(cases >= 10000);
    CHECK(wrong == 0);
}

TEST_CASE("gpu: golden models, in a batch, in chunks, with graphs and without") {
    for (const std::string& name : kTiny) {
        CAPTURE(name);
        Model m(kData + "models/" + name);
        json all = golden("models/" + name + "/golden.json");
        for (int variant = 0; variant < 4; variant++) {
            CAPTURE(variant);
            EngineOptions o;
            o.device = "cuda", o.graphs = variant != 1, o.chunk = variant == 2 ? 7 : 512;
            o.kv_memory = 100 << 20;
            Engine e(m, o);
            int wrong = 0, index = 0;
            double worst = 0;
            std::vector<std::vector<int>> ids(all.size());
            for (const json& one : all) {
                Request r;
                r.prompt = one["prompt"].get<std::vector<int>>();
                r.max_tokens = int(one["greedy"].size());
                r.ignore_eos = true;
                if (variant == 3) r.score_prompt = true;
                e.add(r);
            }
            while (e.busy())
                for (Output& out : e.step()) {
                    ids[out.request].push_back(out.id);
                    if (variant != 3 || !out.finish) continue;
                    double sum = 0, expected = all[out.request]["prompt_logprob"];
                    for (double x : out.prompt_logprobs) sum += x;
                    worst = std::max(worst, std::abs(sum - expected) / std::abs(expected));
                }
            for (const json& one : all) {
                for (size_t i = 0; i < one["greedy"].size() && one["margin"][i] >= 2.0; i++)
                    wrong += ids[index][i] != one["greedy"][i];
                index++;
            }
            MESSAGE(name, " variant ", variant, " logprob error ", worst);
            CHECK(wrong == 0);
            CHECK(worst < 0.02);
            CHECK(e.cache.free() == e.cache.blocks());
        }
    }
}

TEST_CASE("gpu: log-probabilities agree with the CPU's over head sizes, groups and lengths") {
    TempFolder folder;
    std::mt19937 random(3);
    for (int HD : {64, 128})
        for (int G : {1, 2, 3, 4, 7, 8}) {
            int KV = G > 4 ? 1 : 2, H = G * KV;
            json config = {{"architectures", {"Qwen3ForCausalLM"}}, {"vocab_size", 1000},
                {"hidden_size", 256}, {"num_hidden_layers", 2}, {"num_attention_heads", H},
                {"num_key_value_heads", KV}, {"head_dim", HD}, {"intermediate_size", 512},
                {"max_position_embeddings", 16384}, {"rope_theta", 10000.0}};
            folder.write("config.json", config.dump());
            Model m(folder.path, true);
            std::vector<std::vector<int>> prompts;
            for (int n : {1, 2, 15, 16, 17, 63, 64, 65, 130, 1000, 3001}) {
                prompts.emplace_back();
                for (int i = 0; i < n + 1; i++) prompts.back().push_back(random() % 1000);
            }
            EngineOptions on_cpu, on_gpu;
            on_cpu.device = "cpu", on_gpu.device = "cuda";
            auto expected = logprobs_on(m, on_cpu, prompts);
            for (int chunk : {8192, 100, 1}) {
                auto few = prompts;
                if (chunk == 1) few.resize(10);
                on_gpu.chunk = chunk, on_gpu.max_rows = chunk == 1 ? 16 : 64;
                auto got = logprobs_on(m, on_gpu, few);
                double worst = 0, mean = 0, count = 0;
                for (size_t i = 0; i < few.size(); i++)
                    for (size_t j = 0; j < expected[i].size(); j++) {
                        double error = std::abs(expected[i][j] - got[i][j]);
                        worst = std::max(worst, error), mean += error, count++;
                    }
                MESSAGE("head_dim ", HD, " group ", G, " chunk ", chunk, " worst ", worst, " mean ",
                        mean / count);
                CHECK(worst < 0.1);
                CHECK(mean / count < 0.01);
            }
        }
}
