// compress_methods.hpp: the methods by which compress.hpp makes a model's matrices smaller, and the
// tensors of a model, to which they are applied.
#pragma once

#define EIGEN_NO_CUDA
#include <eigen3/Eigen/Eigenvalues>

namespace compress {

using Floats = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

float rounded(float f) { return float(bf16(f)); }

struct Method {
    enum What { kInt, kPrune, kRank } what;
    int amount, group = 0;  // bits, or percent; numbers with a scale of their own, 0: a row
    string name = {};

    explicit Method(const string& text) {
        const char* form[] = {"int%d/%d", "prune%d", "rank%d"};
        const char* stem[] = {"int", "prune", "rank"};
        for (What w : {kInt, kPrune, kRank}) {
            if (sscanf(text.c_str(), form[w], &amount, &group) < 1) continue;
            name = str(stem[what = w], amount, group ? str("/", group) : "");
            bool fits = w == kInt ? amount >= 2 && amount <= 8 : amount >= 1 && amount <= 99;
            if (fits && group >= 0 && name == text) return;
        }
        fail("--methods ", text, ": not known; int2 to int8, int4/32, prune50 and rank50 are");
    }

    int rank(const Matrix& m) const { return std::max(1, std::min(m.rows, m.cols) * amount / 100); }

    // Of the small form.
    double bytes(const Matrix& m) const {
        double n = double(m.rows) * m.cols;
        if (what == kRank) return 2.0 * rank(m) * (m.rows + m.cols);
        if (what == kPrune) return 2 * (n - std::floor(n * amount / 100)) + n / 8;
        int groups = group ? (m.cols + group - 1) / group : 1;
        return n * amount / 8 + 2.0 * m.rows * groups;
    }

    // What the small form of m stands for, as bf16.
    vector<bf16> apply(const Matrix& m) const {
        vector<bf16> out(m.data, m.data + size_t(m.rows) * m.cols);
        if (what == kRank) factor(m, out);
        if (what == kPrune) prune(out);
        for (int r = 0; r < m.rows && what == kInt; r++)
            for (int size = group ? group : m.cols, begin = 0; begin < m.cols; begin += size)
                round(std::span(out).subspan(size_t(r) * m.cols + begin,
                                             std::min(size, m.cols - begin)));
        return out;
    }

private:
    void round(std::span<bf16> group) const {
        float largest = 0, most = float((1 << (amount - 1)) - 1);
        for (bf16 b : group) largest = std::max(largest, std::abs(float(b)));
        float scale = rounded(largest / most);
        for (bf16& b : group) {
            float steps = scale > 0 ? std::nearbyint(float(b) / scale) : 0;
            b = bf16(std::clamp(steps, -most, most) * scale);
        }
    }

    // Without its sign a bf16 counts like its magnitude, so counting finds the limit.
    void prune(vector<bf16>& all) const {
        vector<size_t> count(1 << 15);
        for (bf16 b : all) count[b.bits & 0x7FFF]++;
        size_t left = size_t(double(all.size()) * amount / 100);  // to become 0
        int limit = 0;
        for (; count[limit] <= left; limit++) left -= count[limit];
        for (bf16& b : all) {
            int size = b.bits & 0x7FFF;
            if (size < limit || (size == limit && left > 0 && left--)) b = bf16(0);
        }
    }

    // The eigenvectors of W^T W, or of W W^T if that is smaller, are the singular vectors of W. So
    // W projected on the first ones is one factor, and they are the other.
    void factor(const Matrix& m, vector<bf16>& out) const {
        Floats w(m.rows, m.cols);
        std::copy(out.begin(), out.end(), w.data());
        bool tall = m.rows > m.cols;
        if (!tall) w.transposeInPlace();
        Eigen::SelfAdjointEigenSolver<Floats> solver(w.transpose() * w);  // values ascend
        Floats vectors = solver.eigenvectors().rightCols(rank(m));
        Floats projected = (w * vectors).unaryExpr(&rounded);
        w.noalias() = projected * vectors.unaryExpr(&rounded).transpose();
        if (!tall) w.transposeInPlace();
        std::transform(w.data(), w.data() + w.size(), out.begin(), [](float v) { return bf16(v); });
    }
};

// A tensor of the model: a matrix, which may be compressed, or floats, which stay.
struct Tensor {
    string name, kind;
    int layer;                     // -1: none
    Matrix* view = nullptr;        // the model's own
    std::span<const float> floats = {};
    Matrix original = {};
    vector<bf16> changed = {};
};

// All of the model's, under the names that they have in a file.
vector<Tensor> tensors_of(Model& m) {
    const Config& c = m.config;
    vector<Tensor> all = {{"model.embed_tokens.weight", "embed", -1, &m.embed}};
    if (!c.tied) all.push_back({"lm_head.weight", "lm_head", -1, &m.lm_head});
    all.push_back({"model.norm.weight", "", -1, nullptr, m.final_norm});
    for (int i = 0; i < c.layers; i++) {
        Layer& l = m.layers[i];
        string at = str("model.layers.", i, ".");
        auto matrix = [&](const string& block, const char* kind, Matrix& view) {
            all.push_back({at + block + kind + "_proj.weight", kind, i, &view});
        };
        auto floats = [&](const string& name, std::span<const float> values) {
            if (!values.empty()) all.push_back({at + name, "", i, nullptr, values});
        };
        floats("input_layernorm.weight", l.attn_norm);
        matrix("self_attn.", "q", l.q), matrix("self_attn.", "k", l.k);
        matrix("self_attn.", "v", l.v), matrix("self_attn.", "o", l.o);
        std::span<const float> bias = l.bias;
        if (c.type == "qwen2") {
            floats("self_attn.q_proj.bias", bias.first(c.q_dim()));
            floats("self_attn.k_proj.bias", bias.subspan(c.q_dim(), c.kv_dim()));
            floats("self_attn.v_proj.bias", bias.last(c.kv_dim()));
        }
        floats("self_attn.q_norm.weight", l.q_norm), floats("self_attn.k_norm.weight", l.k_norm);
        floats("post_attention_layernorm.weight", l.mlp_norm);
        matrix("mlp.", "gate", l.gate), matrix("mlp.", "up", l.up), matrix("mlp.", "down", l.down);
    }
    for (Tensor& t : all) if (t.view) t.original = *t.view;
    return all;
}

// A method on a kind of matrix; "all": on every kind.
struct Result {
    string kind, method;
    double bytes, before, perplexity;  // of these matrices, compressed and in bf16
};

}  // namespace compress
