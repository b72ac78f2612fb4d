// Two devices side by side: the same numbers go into an op of each, and what comes out agrees. So a
// chapter is compared with the plain op on the same device, and the plain op on a GPU with the plain
// op on a CPU, by the same tests.
#pragma once
#include "ops.hpp"

// Compares what ops give; tells the largest errors at the end.
struct Comparison {
    double most = 1;  // what no op's error may exceed, whatever its own limit is
    std::map<std::string, std::pair<double, double>> largest = {};  // by op

    // limit: for the error of all rows. got has one row more, which must be untouched: NaN.
    void operator()(const std::string& op, std::vector<float> got, const std::vector<float>& expected,
                    size_t rows, size_t width, double limit) {
        size_t untouched = std::count_if(got.end() - width, got.end(), [](float f) {
            return std::isnan(f);
        });
        got.resize(rows * width);
        auto [error, worst] = relative_errors(got, expected, rows);
        INFO(op, ", rows ", rows);
        CHECK(error < std::min(limit, most));
        CHECK(worst < 3 * std::min(1e-2, most));
        CHECK(untouched == width);
        auto& [all, row] = largest[op];
        all = std::max(all, error), row = std::max(row, worst);
    }
    ~Comparison() {
        for (auto& [op, errors] : largest)
            MESSAGE(op, ": largest error ", errors.first, ", of a row ", errors.second);
    }
};

// Opens the ops and arrays of a device, which are the same on a CPU and on a GPU.
#define NANOCU_OPEN(Base)                                                                         \
    using Base::embed, Base::norm_linear, Base::rotate, Base::attend, Base::add_linear;           \
    using Base::norm_swiglu, Base::norm_weight, Base::run, Base::kLogitRows, Base::c;             \
    using Base::x, Base::normed, Base::qkv, Base::att, Base::gate_up, Base::h, Base::angles;      \
    using Base::logits, Base::kv

// The CPU's device with its chapters, or without some of them. Steps have up to so many tokens, and
// arrays room for one row more.
struct OnCpu : CpuVectors<CpuDevice> {
    using Base = CpuVectors<CpuDevice>;
    NANOCU_OPEN(Base);
    using Base::carve, Base::fill;
    const bool vectors;  // are switched on
    const size_t room;   // in rows
    std::optional<Laid> laid;

    OnCpu(const Model& m, int tokens, int rows, int blocks, vector<string> without = {})
        : Base(m, {tokens + 1, rows, 0, false, without}, keys_transposed(),
               PageLayout::by_token(m.config.head_dim)),
          vectors(without.empty()), room(std::max(tokens + 1, kLogitRows)) {
        reserve(blocks);
        std::fill_n((float*)kv, blocks * c.block_numbers(), 195.0f);
    }

    StepArrays lay(Step& step, int = 0) {
        laid.emplace(*this, step);
        return laid->s;
    }
    // Calls an op as the CPU's are called: by all threads.
    static void all(auto op) {
        #pragma omp parallel
        op();
    }
    static void put(float* to, const std::vector<float>& values) { std::ranges::copy(values, to); }
    static std::vector<float> get(const float* from, size_t n) { return {from, from + n}; }

    // The order in which the vectors' chapter keeps rows that it multiplies with weights.
    void put_input(float* to, const std::vector<float>& rows) const {
        for (size_t i = 0; i < rows.size(); i++) to[place(i)] = rows[i];
    }
    std::vector<float> get_input(const float* from, size_t n) const {
        std::vector<float> rows(n);
        for (size_t i = 0; i < n; i++) rows[i] = from[place(i)];
        return rows;
    }
    size_t place(size_t i) const { return vectors ? i / 16 * 16 + vectors::paired(i % 16) : i; }

    // Queries, keys and values as norm_linear leaves them: with the bias, if it has added it.
    void put_qkv(std::vector<float> rows, const std::vector<float>& bias) {
        for (size_t i = 0; i < rows.size() && vectors; i++) rows[i] += bias[i % bias.size()];
        put(qkv, rows);
    }
    // Whatever ops write becomes NaN, so that it shows if they do not.
    void poison() {
        auto spoil = [&](float* array, size_t width) { std::fill_n(array, room * width, NAN); };
        spoil(x, c.hidden), spoil(normed, c.hidden), spoil(qkv, c.qkv_dim()), spoil(att, c.q_dim());
        spoil(gate_up, 2 * c.intermediate), spoil(h, c.intermediate), spoil(angles, c.head_dim);
        std::fill_n((float*)logits, size_t(kLogitRows) * c.vocab, NAN);
    }
    bool on(const string& chapter) const { return vectors && chapter == "cpu-vectors"; }
};

// The first columns of rows.
inline std::vector<float> columns(const std::vector<float>& rows, size_t width, size_t count) {
    std::vector<float> out;
    for (size_t i = 0; i < rows.size(); i++) if (i % width < count) out.push_back(rows[i]);
    return out;
}

// Keys and values [T, 2, KV, HD] of a step's tokens in a layer of the cache; and one row of NaN.
template <class D>
std::vector<float> cached(D& d, const Step& step, int layer, int blocks) {
    const Shape& c = d.c;
    const std::vector<float> kv = d.get(d.kv, blocks * c.block_numbers());
    std::vector<float> out;
    for (int row = 0; row < step.tokens(); row++) {
        const int block = step.table(row)[step.positions[row] / kBlockSize];
        const int slot = step.positions[row] % kBlockSize;
        for (int value = 0; value < 2; value++)
            for (int head = 0; head < c.kv_heads; head++)
                for (int i = 0; i < c.head_dim; i++)
                    out.push_back(value ? kv[c.value_page(block, layer, head) + c.values.at(slot, i)]
                                        : kv[c.key_page(block, layer, head) + c.keys.at(slot, i)]);
    }
    out.resize(out.size() + 2 * c.kv_heads * c.head_dim, NAN);
    return out;
}

// The logits of a step's rows; and what is behind them.
template <class D>
std::vector<float> logits_of(D& d, const StepArrays& s, int rows) {
    const size_t V = d.c.vocab;
    std::vector<float> all;
    for (int begin = 0; begin < rows; begin += D::kLogitRows) {
        const int count = std::min(D::kLogitRows, rows - begin);
        d.all([&] { d.norm_linear(kLmHead, 0, s.logit_rows + begin, count); });
        auto some = d.get(d.logits, std::min(D::kLogitRows, count + 1) * V);
        all.insert(all.end(), some.begin(), some.begin() + count * V);
        if (rows < D::kLogitRows) all.insert(all.end(), some.end() - V, some.end());
    }
    all.resize((rows + 1) * V, NAN);
    return all;
}

// The ops that are no products: embed, and norm and activation by themselves.
template <class A, class B>
void compare_elements(A& a, B& b, int T, Comparison& compare) {
    const int D = a.c.hidden, HD = a.c.head_dim, F = a.c.intermediate;
    Step step;
    add_part(step, {0}, 0, T);
    step.positions.back() = 16000;  // far along
    const std::vector<float> x = random_values<float>(size_t(T) * D);
    const std::vector<float> both = random_values<bf16>(size_t(T) * 2 * F);
    auto calls = [&]<class Device>(Device& d) {
        using Real = typename Device::Real;
        const StepArrays s = d.lay(step);
        d.poison();
        d.all([&] { d.embed(s); });
        std::vector<std::vector<float>> out = {d.get(d.x, (T + 1) * D), d.get(d.angles, (T + 1) * HD)};
        d.put(d.x, x), d.put(d.gate_up, both);
        d.all([&] {
            d.run(T, Norm<Real>{d.c, nullptr, d.x, d.norm_weight(kQkv, 1), d.normed});
            d.run(2 * T, Activate<Real>{d.c, 2, d.gate_up, d.h});
        });
        out.push_back(d.get(d.normed, (T + 1) * D)), out.push_back(d.get(d.h, (T + 1) * F));
        return out;
    };
    auto expected = calls(a), got = calls(b);
    const int widths[] = {D, HD, D, F};
    for (int i = 0; i < 4; i++) expected[i].resize(size_t(T) * widths[i]);
    compare("embed", got[0], expected[0], T, D, 1e-9);  // exact
    compare("embed, angles", got[1], expected[1], T, HD, 1e-6);
    compare("norm", got[2], expected[2], T, D, 4e-3);
    compare("activate", got[3], expected[3], T, F, 4e-3);
}

// The products, with what is done before and behind them.
template <class A, class B>
void compare_products(const Model& m, A& a, B& b, int T, Comparison& compare) {
    const int D = a.c.hidden, Q = a.c.q_dim(), N = a.c.qkv_dim(), F = a.c.intermediate;
    const int V = a.c.vocab, KV = a.c.kv_heads * a.c.head_dim, blocks = Cache::blocks_for(T);
    static std::mt19937 random(2);
    Step step;
    std::vector<int> table(blocks);
    std::iota(table.rbegin(), table.rend(), 0);
    add_part(step, table, 0, T);
    for (int i = 0; i < std::min(T, 255); i++) step.logit_rows.push_back(int(random() % T));
    const int rows = int(step.logit_rows.size());
    const std::vector<float> x = random_values<float>(size_t(T) * D);
    const std::vector<float> o = random_values<bf16>(size_t(T) * Q);
    const std::vector<float> h = random_values<bf16>(size_t(T) * F);
    auto calls = [&](auto& d) {
        const StepArrays s = d.lay(step);
        std::vector<std::vector<float>> out;
        auto begin = [&] {
            d.poison();
            d.all([&] { d.embed(s); });  // for the angles
            d.put(d.x, x);
        };
        begin();
        d.all([&] { d.norm_linear(kQkv, 1, nullptr, T), d.rotate(s, 1); });
        out.push_back(columns(d.get(d.qkv, (T + 1) * size_t(N)), N, Q));
        out.push_back(cached(d, step, 1, blocks));
        for (Product p : {kO, kDown}) {
            begin();
            if (p == kO) d.put_input(d.att, o);
            else d.put_input(d.h, h);
            d.all([&] { d.add_linear(s, p, 1); });
            out.push_back(d.get(d.x, (T + 1) * size_t(D)));
        }
        begin();
        d.all([&] { d.norm_swiglu(s, 1); });
        out.push_back(d.get_input(d.h, (T + 1) * size_t(F)));
        out.push_back(logits_of(d, s, rows));
        return out;
    };
    auto expected = calls(a), got = calls(b);
    const int widths[] = {Q, 2 * KV, D, D, F, V};
    for (int i = 0; i < 6; i++) expected[i].resize(size_t(i == 5 ? rows : T) * widths[i]);
    INFO(m.config.type, ", hidden size ", D);
    compare("norm_linear and rotate, queries", got[0], expected[0], T, Q, 1e-2);
    compare("norm_linear and rotate, the cache", got[1], expected[1], T, 2 * KV, 1e-2);
    compare("add_linear, attention's", got[2], expected[2], T, D, 1e-3);  // only sums' order differs
    compare("add_linear, the MLP's", got[3], expected[3], T, D, 1e-3);
    compare("norm_swiglu", got[4], expected[4], T, F, 1e-2);
    compare("logits", got[5], expected[5], rows, V, 4e-3);
}

// Texts in a cache: how many tokens each has, and its blocks, which lie in no order. Each may go on
// by so many tokens.
struct Texts {
    std::vector<int> contexts;
    std::vector<std::vector<int>> tables;
    int blocks = 0;

    Texts(std::vector<int> lengths, int more) : contexts(lengths) {
        std::mt19937 random(3);
        for (int n : contexts) blocks += Cache::blocks_for(n + more);
        std::vector<int> all(blocks);
        std::iota(all.begin(), all.end(), 0);
        std::ranges::shuffle(all, random);
        const int longest = *std::ranges::max_element(contexts);
        for (int n : contexts) {
            auto& table = tables.emplace_back(Cache::blocks_for(longest + more));
            for (int i = 0; i < Cache::blocks_for(n + more); i++, all.pop_back())
                table[i] = all.back();
        }
    }
};

// Attention. Contexts are built up as prompts on both devices, and compared up to so many tokens;
// then all texts go on behind their contexts, in chunks and in decodes: each time anew, over what
// was written there the time before. captured: decodes also as a captured step has them.
template <class A, class B>
void compare_attention(const Model& m, A& a, B& b, const Texts& texts, int chunk, int compared,
                       bool captured, Comparison& compare) {
    const int Q = a.c.q_dim(), N = a.c.qkv_dim(), HD = a.c.head_dim, G = a.c.group(), kLayer = 1;
    const int count = int(texts.contexts.size()), longest = texts.contexts[0];
    INFO(m.config.type, ", head_dim ", HD, ", query heads of a kv head ", G);
    // padded: rows that kernels are launched for, where the step is captured; else 0
    auto attend = [&](const char* name, Step& step, int padded, bool only_write = false) {
        const int T = step.tokens();
        std::vector<float> rows = random_values<bf16>(size_t(T) * N);
        #pragma omp parallel for
        for (int t = 0; t < T; t++) {
            float *q = &rows[size_t(t) * N], *k = q + Q;
            // a token likes itself best, so that it shows in long contexts, too
            for (int i = 0; i < Q; i++)
                q[i] = float(bf16(q[i] + 0.4f * k[i / HD / G * HD + i % HD]));
        }
        auto calls = [&](auto& d) {
            const StepArrays s = d.lay(step, padded);
            d.poison();
            d.all([&] { d.embed(s); });  // for the angles
            d.put_qkv(rows, m.layers[kLayer].bias);
            d.all([&] { d.rotate(s, kLayer); });
            if (!only_write) d.all([&] { d.attend(s, kLayer); });
            return std::pair(d.get_input(d.att, (T + 1) * size_t(Q)), s.tiles);
        };
        auto [expected, none] = calls(a);
        auto [got, tiles] = calls(b);
        expected.resize(size_t(T) * Q);
        if (!only_write) compare(name, got, expected, T, Q, 1e-2);
        return tiles;
    };
    for (int begin = 0; begin < longest; begin += chunk) {
        Step step;
        for (int i = 0; i < count; i++)
            if (begin < texts.contexts[i])
                add_part(step, texts.tables[i], begin, std::min(texts.contexts[i], begin + chunk));
        attend("attend, contexts", step, 0, begin >= compared);
    }
    const int counts[] = {1, 2, 5, 64, 100, 129, 1000};
    for (int round = 0; round < 7; round++) {
        Step step;
        for (int i = 0; i < count; i++) {
            const int n = i < 12 ? std::min(counts[(i + round) % 7], chunk) : 1;
            add_part(step, texts.tables[i], texts.contexts[i], texts.contexts[i] + n);
        }
        attend("attend, chunks beside decodes", step, 0);
    }
    for (int n : {1, 3, 12, count}) {
        Step step;
        for (int i = 0; i < n; i++)
            add_part(step, texts.tables[i], texts.contexts[i], texts.contexts[i] + 1);
        attend("attend, decodes", step, 0);
        if (captured) attend("attend, decodes as captured", step, (n + 15) / 16 * 16);
    }
    // of three, one has a context of its own, the others begin with the blocks of one of two
    const int most = longest / kBlockSize - 2;  // pages that the first two texts have, in full
    for (int more : {1, 300}) {
        Step step;
        for (int i = 0; i < count; i++) {
            const int pages = std::array{0, std::min(120, most), std::min(40, most)}[i % 3];
            const auto& from = texts.tables[i % 3 == 1 ? 0 : 11];
            std::vector<int> table(from.begin(), from.begin() + pages);
            table.insert(table.end(), texts.tables[i].begin(), texts.tables[i].end());
            table.resize(texts.tables[0].size() + 120);
            const int n = i % 3 ? 1 + texts.contexts[i] % 120 + pages * kBlockSize : texts.contexts[i];
            add_part(step, table, n, n + (i == 5 ? std::min(more, chunk) : 1));
        }
        const int tiles = attend("attend, decodes that share blocks", step, 0);
        if (b.on("shared-prefix")) CHECK(tiles >= 1 + more / 300);
        if (captured && more == 1) attend("attend, shared as captured", step, 48);
    }
}
