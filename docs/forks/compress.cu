// compress.cu: what smaller weights cost. Methods that shrink a model's matrices are applied to all
// matrices of a kind (all q, all gate, ...) and to all matrices at once, and each time the
// perplexity of a text is measured:
//
//   int8, int4, int4/64  symmetric rounding to nearest: the numbers of a row, or of each 64 in a
//                        row, are integers of b bits times one bf16 scale, largest / (2^(b-1) - 1)
//   prune50              the half of a matrix that is smallest in magnitude becomes 0; what is left
//                        stays bf16, and a bit for each number tells where it goes
//   rank50               two bf16 factors of half the full rank, by the singular value
//                        decomposition: no others are closer (Eckart and Young 1936)
//
// The engine computes with bf16, so it gets what the small form stands for, rounded to bf16: a copy
// of each changed matrix, where the model's view then points. Sizes are those of the small form.
#define NANOCU_NO_MAIN
#include "../../nano.cu"

#define EIGEN_NO_CUDA
#include <eigen3/Eigen/Eigenvalues>

using Floats = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

float rounded(float f) { return bf16_to_float(float_to_bf16(f)); }

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
        for (bf16 b : group) largest = std::max(largest, std::abs(bf16_to_float(b)));
        float scale = rounded(largest / most);
        for (bf16& b : group) {
            float steps = scale > 0 ? std::nearbyint(bf16_to_float(b) / scale) : 0;
            b = float_to_bf16(std::clamp(steps, -most, most) * scale);
        }
    }

    // Without its sign a bf16 counts like its magnitude, so counting finds the limit.
    void prune(vector<bf16>& all) const {
        vector<size_t> count(1 << 15);
        for (bf16 b : all) count[b & 0x7FFF]++;
        size_t left = size_t(double(all.size()) * amount / 100);  // to become 0
        int limit = 0;
        for (; count[limit] <= left; limit++) left -= count[limit];
        for (bf16& b : all) {
            int size = b & 0x7FFF;
            if (size < limit || (size == limit && left > 0 && left--)) b = 0;
        }
    }

    // The eigenvectors of W^T W, or of W W^T if that is smaller, are the singular vectors of W. So
    // W projected on the first ones is one factor, and they are the other.
    void factor(const Matrix& m, vector<bf16>& out) const {
        Floats w(m.rows, m.cols);
        std::transform(out.begin(), out.end(), w.data(), bf16_to_float);
        bool tall = m.rows > m.cols;
        if (!tall) w.transposeInPlace();
        Eigen::SelfAdjointEigenSolver<Floats> solver(w.transpose() * w);  // values ascend
        Floats vectors = solver.eigenvectors().rightCols(rank(m));
        Floats projected = (w * vectors).unaryExpr(&rounded);
        w.noalias() = projected * vectors.unaryExpr(&rounded).transpose();
        if (!tall) w.transposeInPlace();
        std::transform(w.data(), w.data() + w.size(), out.begin(), float_to_bf16);
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

// Of ids, each given those before it. A new engine: a GPU's has the weights that it began with.
double perplexity(const Model& model, const Flags& f, const vector<int>& ids) {
    Engine engine(model, f);
    Request r;
    r.prompt = ids;
    r.score_prompt = true;
    r.max_tokens = 1;
    engine.add(r);
    double sum = 0;
    while (engine.busy() && !interrupted)
        for (const Output& o : engine.step())
            for (const auto& of_token : o.prompt_logprobs) sum += of_token[0].logprob;
    return std::exp(-sum / double(ids.size() - 1));
}

// A method on a kind of matrix; "all": on every kind.
struct Result {
    string kind, method;
    double bytes, before, perplexity;  // of these matrices, compressed and in bf16
};

#include "whole_file.hpp"
#include "compress.hpp"  // how results are shown, and models are written

struct Options {
    vector<string> methods = {"int8", "int4", "int4/64", "int4/32", "prune50", "prune75", "rank75",
                              "rank50"};
    vector<string> kinds;
    int tokens = 256, layer = -1;
    string svg, folder;
};

void compress(const Flags& f, const Options& o) {
    vector<Method> methods(o.methods.begin(), o.methods.end());
    if (!o.folder.empty() && methods.size() != 1) fail("--write: give one method with --methods");
    if (!o.folder.empty()) check_new(o.folder);
    Model m(f.model, f.load == "dummy");
    if (o.layer >= m.config.layers)
        fail("--layer ", o.layer, ": the model has 0 to ", m.config.layers - 1);
    Tokenizer tokenizer(f.model);
    vector<int> ids = tokenizer.encode(input_text(f), !f.no_special);
    if (ids.size() < 2) fail("the text: ", ids.size(), " tokens; give some more");
    ids.resize(std::min<size_t>(ids.size(), o.tokens));
    vector<Tensor> tensors = tensors_of(m);
    vector<string> kinds;  // in their order in a layer, the chosen ones
    vector<Tensor*> chosen;
    std::set<string> unknown(o.kinds.begin(), o.kinds.end());
    for (Tensor& t : tensors) {
        bool wanted = o.kinds.empty() || std::ranges::count(o.kinds, t.kind);
        if (!t.view || !wanted || (o.layer >= 0 && t.layer != o.layer)) continue;
        if (!std::ranges::count(kinds, t.kind)) kinds.push_back(t.kind);
        unknown.erase(t.kind);
        chosen.push_back(&t);
    }
    if (!unknown.empty())
        fail("--kinds ", *unknown.begin(), ": no such matrix here; q, k, v, o, gate, up, down are; "
             "without --layer embed, and lm_head if it is not embed");
    if (kinds.size() > 1) kinds.push_back("all");
    if (!o.folder.empty()) kinds = {kinds.back()};
    auto point = [&](const string& kind, bool changed) {
        for (Tensor* t : chosen)
            if (kind == "all" || kind == t->kind)
                t->view->data = changed ? t->changed.data() : t->original.data;
        if (m.config.tied) m.lm_head = m.embed;
    };
    Eigen::setCpuCacheSizes(32 << 10, 512 << 10, 4 << 20);  // fixed: the same bits on any machine
    double base = perplexity(m, f, ids);
    vector<Result> results;
    for (const Method& method : methods) {
        #pragma omp parallel for schedule(dynamic)
        for (Tensor* t : chosen) if (!interrupted) t->changed = method.apply(t->original);
        for (const string& kind : kinds) {
            if (interrupted) return;
            if (isatty(2)) std::cerr << "\r\33[K" << method.name << " " << kind << std::flush;
            Result r = {kind, method.name, 0, 0, 0};
            for (Tensor* t : chosen) if (kind == "all" || kind == t->kind) {
                r.bytes += method.bytes(t->original);
                r.before += 2.0 * t->original.rows * t->original.cols;
            }
            point(kind, true);
            r.perplexity = perplexity(m, f, ids);
            if (o.folder.empty()) point(kind, false);
            results.push_back(r);
        }
    }
    if (isatty(2)) std::cerr << "\r\33[K";
    if (interrupted) return;
    double whole = double(m.weights.bytes);
    if (!o.svg.empty()) WholeFile(o.svg).finish(plot(results, kinds, o.methods, base));
    if (!o.folder.empty()) write_model(f.model, o.folder, tensors);
    show(f, results, kinds, o.methods, base, ids.size(), whole);
    if (!o.folder.empty())
        put(str("\n", o.folder, ": written, in bf16 and so as large as before; compressed the "
                "weights would take ", megabytes(whole - results[0].before + results[0].bytes),
                " of ", megabytes(whole), " MB\n"));
}

int main(int argc, char** argv) {
    CommandLine line("compress: size against perplexity");
    Options o;
    line.model("");
    line.text_flags(line.own);
    line.flag(line.own, "--no-special", line.f.no_special, "add no bos in front of the text");
    line.flag(line.own, "--tokens", o.tokens, "of the text, the first; else 256",
              CLI::Range(2, 1 << 20));
    auto list = [&](const char* name, vector<string>& value, const char* what) {
        line.app.add_option(name, value, what)->delimiter(',')->allow_extra_args(false);
    };
    list("--methods", o.methods, "int2 to int8, int4/32, prune50, rank50; with commas between");
    list("--kinds", o.kinds, "only these: q, k, v, o, gate, up, down, embed, lm_head");
    line.flag(line.own, "--layer", o.layer, "only matrices of this layer, from 0",
              CLI::Range(0, 10000));
    line.flag(line.own, "--svg", o.svg, "a file for the plot");
    line.flag(line.own, "--write", o.folder, "a new folder for the model after the one method");
    line.flag(line.own, "--json", line.f.json, "JSON, an object a measurement");
    line.engine_flags(line.own);
    return line.run(argc, argv, [&] { compress(line.f, o); });
}
