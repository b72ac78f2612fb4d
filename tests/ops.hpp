// What tests of ops share, on a CPU and on a GPU: random numbers, models and steps, and the error of
// what comes out.
#pragma once
#include "common.hpp"

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
inline Model random_model(const std::string& family, int D, int F, int H, int KV, int HD) {
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
inline void add_part(Step& step, const std::vector<int>& table, int begin, int end) {
    step.table_width = int(table.size());
    int sequence = int(step.tables.size() / table.size());
    for (int i = begin; i < end; i++) {
        step.ids.push_back(i * 7 % 1000);
        step.positions.push_back(i);
        step.sequence.push_back(sequence);
    }
    step.tables.insert(step.tables.end(), table.begin(), table.end());
}

// A step's arrays, laid out by a device of the CPU (its carve and fill are open). rows: with those
// behind the step's own, if any.
struct Laid {
    vector<Pack<float, 4>> memory;
    StepArrays s;

    Laid(auto& device, const Step& step, int rows = 0) {
        s.rows = std::max(rows, step.tokens());
        s.draws = int(step.draws.size());
        place(device, 0);
        memory.resize(uintptr_t(s.tables + step.tables.size()) / 16 + 1);
        place(device, uintptr_t(memory.data()));
        device.fill(s, step);
    }
    void place(auto& device, uintptr_t at) {
        Carver carver = {at};
        device.carve(carver, s);
        s.tables = (int*)carver.at;
    }
};

// The relative L2 error ||got - expected|| / ||expected|| of all, and that of the worst row.
inline std::pair<double, double> relative_errors(const std::vector<float>& got,
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
