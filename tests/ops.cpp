// The ops of nano.cu, each against what it means, worked out in double precision by the plainest of
// loops. They are run by one thread, as on a CPU, and by teams of threads that play a thread block,
// as on a GPU; for numbers of either; and over pages that lie in each of the ways that devices use.
#include "ops.hpp"
#include "team.hpp"
#ifndef NANOCU_TEAM_ALONE
#include "twins.hpp"
#endif

namespace {

// A device whose arrays of a step and plan of attention are open. Tests run the ops themselves.
struct OpenedCpu : CpuDevice {
    using CpuDevice::carve, CpuDevice::fill, CpuDevice::c;

    explicit OpenedCpu(const Model& m, PageLayout keys, PageLayout values)
        : CpuDevice(m, {64, 8, 0, false, {}}, keys, values) {}
};

// Runs an op for all units, each by a team of its own, as a GPU does.
template <class Op>
void run_by_teams(int threads, int units, const Op& op, size_t scratch = 0) {
    for (int unit = 0; unit < units; unit++)
        ThreadTeam::run(threads, scratch, [&](ThreadTeam& team) { op(team, unit); });
}

// n numbers that show if nobody writes them.
template <class T>
vector<T> unwritten(size_t n) { return vector<T>(n, T(NAN)); }

template <class T>
vector<T> random_of(size_t n) {
    vector<float> values = random_values<T>(n);
    return vector<T>(values.begin(), values.end());
}

// Numbers are equal but for what rounding to Real costs them; those expected to be NaN are untouched.
template <class Real>
void check_close(const vector<Real>& got, const vector<double>& expected, double tolerance = 0) {
    if (tolerance == 0) tolerance = std::is_same_v<Real, float> ? 2e-5 : 8e-3;
    REQUIRE(got.size() == expected.size());
    double squares = 0;
    size_t count = 1, wrong = 0, first = 0;
    for (double e : expected) if (!std::isnan(e) && std::abs(e) < 1e20) squares += e * e, count++;
    const double usual = std::sqrt(squares / double(count));
    for (size_t i = 0; i < got.size(); i++) {
        const double g = float(got[i]), e = expected[i];
        if (std::isnan(e) ? std::isnan(g) : std::abs(g - e) <= tolerance * (std::abs(e) + usual))
            continue;
        if (wrong++ == 0) first = i;
    }
    INFO("number ", first, " is ", float(got[first]), ", not ", expected[first]);
    CHECK(wrong == 0);
}

// Ways for pages to lie: of nano.cu alone, as tensor cores want them, as CPU vectors want keys.
const char* const kLayouts[] = {"by token", "in matrices", "transposed"};
PageLayout layout_of(int kind, int head_dim) {
    if (kind == 1) return {8, 8 * head_dim, 1, 64};
    if (kind == 2) return {1, 8, kBlockSize, 8 * kBlockSize};
    return PageLayout::by_token(head_dim);
}

// Teams that tests use. ThreadSanitizer takes its time over many threads, and finds no more.
#ifdef NANOCU_TEAM_ALONE
constexpr bool kSmall = true;
const vector<int> kTeams = {32};
#else
constexpr bool kSmall = kSanitized;
const vector<int> kTeams = {1, 32, 128};
#endif

// A model of random weights on a device, and a step on it: a sequence for each of contexts, which
// goes on by so many tokens behind it, in blocks of no order.
struct Case {
    Model m;
    OpenedCpu device;
    Step step;
    int blocks = 1;  // one more than are used

    Case(const string& family, int H, int KV, int HD, int layout,
         const vector<std::pair<int, int>>& contexts)
        : m(random_model(family, 16, 16, H, KV, HD)),
          device(m, layout_of(layout, HD), layout_of(layout == 2 ? 0 : layout, HD)) {
        vector<int> all;
        int width = 0;
        for (auto [begin, count] : contexts) {
            width = std::max(width, Cache::blocks_for(begin + count));
            blocks += Cache::blocks_for(begin + count);
        }
        for (int i = 0; i < blocks; i++) all.push_back(i);
        std::mt19937 random(5);
        std::ranges::shuffle(all, random);
        for (auto [begin, count] : contexts) {
            vector<int> table(width);
            for (int i = 0; i < Cache::blocks_for(begin + count); i++, all.pop_back())
                table[i] = all.back();
            add_part(step, table, begin, begin + count);
        }
    }
    const Shape& shape() const { return device.c; }
};

// ----- Queries, keys and values

// What becomes of a head of q, k or v: bias, norm, RoPE by the angles of a row [2, HD / 2].
template <class Real>
vector<double> turned(const Real* v, const float* bias, const float* weight, double eps,
                      const float* angles, int HD) {
    vector<double> in(HD), out(HD);
    double squares = 0;
    for (int i = 0; i < HD; i++) {
        in[i] = float(v[i]) + (bias ? double(bias[i]) : 0);
        squares += in[i] * in[i];
    }
    for (int i = 0; i < HD && weight; i++) in[i] *= weight[i] / std::sqrt(squares / HD + eps);
    for (int i = 0; i < HD; i++) {
        const int j = i % (HD / 2);
        const double other = i < HD / 2 ? -in[i + HD / 2] : in[j];
        out[i] = angles ? in[i] * angles[j] + other * angles[HD / 2 + j] : in[i];
    }
    return out;
}

template <class Real>
void try_rotate(Case& test, int threads, int parts) {
    const Shape& c = test.shape();
    const Layer& l = test.m.layers[1];
    const int T = test.step.tokens(), H = c.heads, KV = c.kv_heads, HD = c.head_dim;
    Laid laid(test.device, test.step, T + 2);  // as captured
    const StepArrays& s = laid.s;
    const float *bias = test.m.config.type == "qwen2" ? l.bias.data() : nullptr;
    const float* norms[] = {l.q_norm.empty() ? nullptr : l.q_norm.data(),
                            l.k_norm.empty() ? nullptr : l.k_norm.data()};
    vector<float> angles(size_t(T + 2) * HD);
    for (int i = 0; i < T * HD; i++) {
        float angle = float(s.positions[i / HD]) * test.m.config.inv_freq[i % (HD / 2)];
        angles[i] = i % HD < HD / 2 ? std::cos(angle) : std::sin(angle);
    }
    vector<Real> qkv = random_of<Real>(size_t(T + 2) * c.qkv_dim());
    vector<Real> kv(test.blocks * c.block_numbers(), Real(1e30f));
    vector<double> q_expected(qkv.begin(), qkv.end()), kv_expected(kv.begin(), kv.end());
    for (int t = 0; t < T; t++)
        for (int head = 0; head < H + 2 * KV; head++) {
            const size_t at = (size_t(t) * (H + 2 * KV) + head) * HD;
            const bool value = head >= H + KV;
            vector<double> out = turned(&qkv[at], bias ? bias + head * HD : nullptr,
                                        value ? nullptr : norms[head >= H], c.norm_eps,
                                        value ? nullptr : &angles[t * HD], HD);
            const int block = s.table(t)[s.positions[t] / kBlockSize];
            const size_t page = value ? c.value_page(block, 1, head - H - KV)
                                      : c.key_page(block, 1, head - H);
            for (int d = 0; d < HD; d++) {
                const PageLayout& layout = value ? c.values : c.keys;
                if (head < H) q_expected[at + d] = out[d];
                else kv_expected[page + layout.at(s.positions[t] % kBlockSize, d)] = out[d];
            }
        }
    run_by_teams(threads, s.rows * parts,
                 Rotate<Real>{s, c, 1, parts, bias, norms[0], norms[1], angles.data(), qkv.data(),
                              kv.data()});
    check_close(qkv, q_expected);
    check_close(kv, kv_expected);
}

// The cache of a case: random keys and values where tokens are, elsewhere what nobody may use.
template <class Real>
vector<Real> random_cache(const Case& test) {
    const Shape& c = test.shape();
    vector<Real> kv(test.blocks * c.block_numbers(), Real(1e30f));
    for (int row = 0; row < test.step.tokens(); row++) {
        const int tokens = test.step.positions[row] + 1;
        const vector<Real> numbers = random_of<Real>(size_t(tokens) * 2 * c.kv_heads * c.head_dim);
        for (int t = 0, i = 0; t < tokens; t++)
            for (int head = 0; head < c.kv_heads; head++)
                for (int d = 0; d < c.head_dim; d++) {
                    const int block = test.step.table(row)[t / kBlockSize], slot = t % kBlockSize;
                    kv[c.key_page(block, 1, head) + c.keys.at(slot, d)] = numbers[i++];
                    kv[c.value_page(block, 1, head) + c.values.at(slot, d)] = numbers[i++];
                }
    }
    return kv;
}

// softmax(q K^T / sqrt(HD)) V of each row and head; and one row more, which nobody writes.
template <class Real>
vector<double> attended(const Case& test, const vector<Real>& qkv, const vector<Real>& kv) {
    const Shape& c = test.shape();
    vector<double> out;
    for (int row = 0; row < test.step.tokens(); row++)
        for (int head = 0; head < c.heads; head++) {
            vector<double> scores, sum(c.head_dim);
            const int kv_head = head / c.group(), *table = test.step.table(row);
            double total = 0;
            for (int t = 0; t <= test.step.positions[row]; t++) {
                double score = 0;
                for (int d = 0; d < c.head_dim; d++)
                    score += double(float(qkv[size_t(row) * c.qkv_dim() + head * c.head_dim + d])) *
                        float(kv[c.key_page(table[t / kBlockSize], 1, kv_head) +
                                 c.keys.at(t % kBlockSize, d)]);
                scores.push_back(score / std::sqrt(c.head_dim));
            }
            const double top = *std::ranges::max_element(scores);
            for (int t = 0; t <= test.step.positions[row]; t++) {
                const double weight = std::exp(scores[t] - top);
                total += weight;
                for (int d = 0; d < c.head_dim; d++)
                    sum[d] += weight * float(kv[c.value_page(table[t / kBlockSize], 1, kv_head) +
                                                c.values.at(t % kBlockSize, d)]);
            }
            for (double s : sum) out.push_back(s / total);
        }
    out.resize(out.size() + c.q_dim(), NAN);
    return out;
}

template <class Real>
vector<Real> random_queries(const Case& test) {
    vector<Real> qkv = random_of<Real>(size_t(test.step.tokens()) * test.shape().qkv_dim());
    for (Real& q : qkv) q = Real(2 * float(q));  // so that some tokens count more than others
    return qkv;
}

// Attention of the tiles or of the rows that are alone, by a team, as CudaDevice starts it.
template <class Real, int kLanes, int kQueries>
void attend_by(const StepArrays& s, const Shape& c, int threads, bool of_prompts, int parts,
               const Real* qkv, const Real* kv, float* partial, Real* att) {
    using Op = Attend<Real, kLanes, kQueries>;
    const int chunks = Op::chunks((of_prompts ? tile_rows_of(c) : 1) * c.group());
    const int tiles = of_prompts ? s.tiles : s.decodes;
    const size_t scratch = Op::scratch(c.head_dim) * threads / Op::kThreads;
    run_by_teams(threads, (tiles + 1) * chunks * c.kv_heads * parts,  // one more than there are
                 Op{s, c, 1, parts, of_prompts, qkv, kv, partial, att}, scratch);
}
template <class Real, int kQueries>
void attend_by_head_dim(const Shape& c, auto... arguments) {
    if (c.head_dim <= 64) attend_by<Real, 8, kQueries>(arguments...);
    else if (c.head_dim <= 128) attend_by<Real, 16, kQueries>(arguments...);
    else attend_by<Real, 32, kQueries>(arguments...);
}

template <class Real>
void try_attend(Case& test, int threads, int parts) {
    const Shape& c = test.shape();
    Laid laid(test.device, test.step);
    const StepArrays& s = laid.s;
    const vector<Real> kv = random_cache<Real>(test), qkv = random_queries<Real>(test);
    const vector<double> expected = attended(test, qkv, kv);
    vector<Real> att = unwritten<Real>(expected.size());
    vector<float> partial = unwritten<float>(size_t(s.decodes) * c.heads * parts * (c.head_dim + 2));
    auto run = [&]<int kQueries>(bool of_prompts, int parts) {
        attend_by_head_dim<Real, kQueries>(c, s, c, threads, of_prompts, parts, qkv.data(),
                                           kv.data(), partial.data(), att.data());
    };
    run.template operator()<kMostQueries>(true, 1);
    if (c.group() <= 2) run.template operator()<2>(false, parts);
    else run.template operator()<kMostQueries>(false, parts);
    if (parts > 1)
        run_by_teams(threads, (s.decodes + 1) * c.heads,
                     MergeParts<Real>{s, c, parts, partial.data(), att.data()});
    check_close(att, expected);
}

template <class Real>
void try_attend_alone(Case& test) {
    const Shape& c = test.shape();
    Laid laid(test.device, test.step);
    const vector<Real> kv = random_cache<Real>(test), qkv = random_queries<Real>(test);
    const vector<double> expected = attended(test, qkv, kv);
    vector<Real> att = unwritten<Real>(expected.size());
    const AttendAlone<Real> op = {laid.s, c, 1, qkv.data(), kv.data(), att.data()};
    vector<float> scratch = unwritten<float>(op.scratch() / sizeof(float));
    OneThread team((char*)scratch.data());
    for (int unit = 0; unit < laid.s.rows * c.heads; unit++) op(team, unit);
    check_close(att, expected);
}

// ----- The other ops

template <class Real>
void try_norm(int threads, int D, bool picked) {
    Config config = {};
    config.hidden = D, config.norm_eps = 1e-2f, config.heads = config.kv_heads = 1;
    const int rows[] = {3, 0, 3, 1};
    const vector<float> x = random_of<float>(5 * size_t(D)), weight = random_of<float>(D);
    vector<Real> out = unwritten<Real>(5 * size_t(D));
    vector<double> expected;
    for (int unit = 0; unit < 4; unit++) {
        const float* from = &x[size_t(picked ? rows[unit] : unit) * D];
        double squares = 0;
        for (int i = 0; i < D; i++) squares += double(from[i]) * from[i];
        for (int i = 0; i < D; i++)
            expected.push_back(from[i] * weight[i] / std::sqrt(squares / D + config.norm_eps));
    }
    expected.resize(out.size(), NAN);
    const PageLayout layout = PageLayout::by_token(16);
    run_by_teams(threads, 4, Norm<Real>{Shape(config, layout, layout), picked ? rows : nullptr,
                                        x.data(), weight.data(), out.data()});
    check_close(out, expected);
}

template <class Real>
void try_activate(int threads, int F, int parts) {
    Config config = {};
    config.intermediate = F, config.heads = config.kv_heads = 1;
    vector<Real> gate_up = random_of<Real>(3 * 2 * size_t(F)), h = unwritten<Real>(4 * size_t(F));
    for (int i = 0; i < F; i += 5) gate_up[i] = Real(i % 2 ? 100.0f : -100.0f);
    vector<double> expected;
    for (int row = 0; row < 3; row++)
        for (int i = 0; i < F; i++) {
            const double gate = float(gate_up[size_t(row) * 2 * F + i]);
            expected.push_back(gate / (1 + std::exp(-gate)) * float(gate_up[size_t(2 * row + 1) * F + i]));
        }
    expected.resize(h.size(), NAN);
    const PageLayout layout = PageLayout::by_token(16);
    run_by_teams(threads, 3 * parts, Activate<Real>{Shape(config, layout, layout), parts,
                                                    gate_up.data(), h.data()});
    check_close(h, expected);
}

}  // namespace

TEST_CASE("op embed: embeddings of ids, known or just drawn, and their angles") {
    for (int HD : {16, 64}) for (int threads : kTeams) {
        CAPTURE(threads);
        Case test("Llama", 1, 1, HD, 0, {{0, 3}, {16000, 1}, {7, 1}});
        const int T = 5, D = test.shape().hidden, drawn[] = {900, 1002};
        test.step.ids[3] = -2, test.step.ids[4] = -1;
        Laid laid(test.device, test.step, T + 1);  // one row is only there because of a graph
        vector<float> x = unwritten<float>((T + 2) * size_t(D));
        vector<float> angles = unwritten<float>((T + 2) * size_t(HD));
        run_by_teams(threads, T + 1, Embed{laid.s, test.shape(), drawn, test.m.embed.data,
                                           test.m.config.inv_freq.data(), x.data(), angles.data()});
        vector<double> expected, turns;
        for (int row = 0; row <= T; row++) {
            const int id = row == 3 ? 1002 : row == 4 ? 900 : row < T ? test.step.ids[row] : 0;
            for (int i = 0; i < D; i++) expected.push_back(float(test.m.embed.row(id)[i]));
            for (int i = 0; i < HD; i++) {
                const float angle = float(row < T ? test.step.positions[row] : 0) *
                                    test.m.config.inv_freq[i % (HD / 2)];
                turns.push_back(i < HD / 2 ? std::cos(double(angle)) : std::sin(double(angle)));
            }
        }
        expected.resize(x.size(), NAN), turns.resize(angles.size(), NAN);
        check_close(x, expected, 1e-12);
        check_close(angles, turns);
    }
}

TEST_CASE("op norm: rows as they come, and picked ones") {
    for (int threads : kTeams) for (int D : {16, 192, 1040}) for (bool picked : {false, true}) {
        CAPTURE(threads);
        CAPTURE(D);
        try_norm<float>(threads, D, picked);
        try_norm<bf16>(threads, D, picked);
    }
}

TEST_CASE("op rotate: bias, norm, RoPE, and a slot in the cache") {
    const struct { const char* family; int H, KV, HD, layout; } models[] = {
        {"Llama", 3, 3, 64, 0}, {"Qwen2", 7, 1, 96, 1}, {"Qwen3", 2, 2, 128, 1},
        {"Llama", 16, 1, 256, 0}, {"Qwen3", 4, 2, 64, 2}, {"Qwen2", 4, 1, 128, 2},
        {"Qwen3", 8, 1, 80, 0}, {"Qwen2", 2, 1, 16, 1}, {"Qwen3", 2, 1, 320, 0}};
    for (const auto& [family, H, KV, HD, layout] : models) for (int threads : kTeams) {
        INFO(family, ", ", H, " heads, ", KV, " kv heads, head_dim ", HD, ", pages ",
             kLayouts[layout], ", threads ", threads);
        Case test(family, H, KV, HD, layout, {{14, 4}, {1000, 1}, {0, 1}});
        for (int parts : {1, 3}) {
            try_rotate<bf16>(test, threads, parts);
            if (!kSmall || HD < 128) try_rotate<float>(test, threads, parts);
        }
    }
}

TEST_CASE("op attend: prompts in tiles beside rows that are alone, in one part or several") {
    const struct { int G, KV, HD, layout, threads; } models[] = {
        {2, 1, 128, 1, 32}, {3, 2, 64, 0, 32}, {8, 1, 96, 1, 32}, {1, 2, 64, 0, 128},
        {4, 1, 64, 1, 32}, {7, 1, 64, 0, 64}, {8, 1, 128, 1, 32}, {16, 1, 256, 0, 32},
        {1, 1, 256, 1, 128}, {2, 2, 96, 1, 32}, {16, 1, 64, 0, 32}, {3, 1, 96, 0, 32}};
    for (const auto& [G, KV, HD, layout, most] : models) {
        if (kSmall && G == 4) break;  // these are enough
        const int threads = kSmall ? 32 : most;
        INFO(G, " query heads of a kv head, ", KV, " kv heads, head_dim ", HD, ", pages ",
             kLayouts[layout], ", threads ", threads);
        vector<std::pair<int, int>> contexts = {{13, 6}, {70, 1}, {0, 1}, {0, 2}, {15, 1}};
        if (kSmall) contexts = {{14, 3}, {33, 1}};
        Case test("Llama", G * KV, KV, HD, layout, contexts);
        // 70 tokens are 5 pages: in 3 parts 2, 2 and 1; in 32 parts 1 each
        try_attend<float>(test, threads, G % 2 ? 3 : 1);
        try_attend<bf16>(test, threads, G % 2 ? 1 : 32);
    }
}

TEST_CASE("op attend: by one thread") {
    for (int G : kSmall ? vector{2} : vector{1, 2, 3, 4, 7, 8, 16}) for (int HD : {64, 96, 128, 256}) {
        Case test("Llama", G * 2, 2, HD, (G + HD / 32) % 3, {{13, 6}, {70, 1}, {0, 1}, {0, 2}});
        INFO(G, " query heads of a kv head, head_dim ", HD);
        try_attend_alone<float>(test);
        try_attend_alone<bf16>(test);
    }
}

TEST_CASE("op activate: SiLU of one half times the other, in one part or several") {
    for (int threads : kTeams) for (int F : {16, 1536}) for (int parts : {1, 2}) {
        CAPTURE(threads);
        CAPTURE(F);
        CAPTURE(parts);
        try_activate<float>(threads, F, parts);
        try_activate<bf16>(threads, F, parts);
    }
}

TEST_CASE("op draw: for each key the id that one thread draws, in both places") {
    const int V = 700, rows = 3;
    const vector<float> logits = random_of<float>(rows * V);
    vector<DrawKey> keys;
    for (int i = 0; i < 6; i++) {
        Sampling s;
        s.temperature = i == 1 ? 0 : 0.5f + 0.2f * float(i), s.seed = i;
        if (i > 2) s.top_k = 10 * i, s.top_p = 0.9f;
        keys.push_back({s, (i + 2) % rows, i, 100 * i});
    }
    for (int threads : kTeams) {
        CAPTURE(threads);
        vector<int> drawn(7, -7), host(7, -7), expected;
        run_by_teams(threads, 6, DrawIds{keys.data(), logits.data(), V, drawn.data(), host.data()},
                     kDrawScratch);
        for (const DrawKey& key : keys)
            expected.push_back(sample_id(std::span(logits).subspan(key.row * V, V), key.sampling,
                                         key.sample, key.position));
        expected.push_back(-7);
        CHECK(drawn == expected);
        CHECK(host == expected);
    }
}

#ifndef NANOCU_TEAM_ALONE
TEST_CASE("op by op: vectors of the CPU against the plain ops") {
    const struct { const char* family; int D, F, H, KV, HD; } models[] = {
        {"Llama", 64, 128, 1, 1, 64}, {"Qwen3", 256, 512, 4, 2, 64}, {"Llama", 576, 1536, 9, 3, 64},
        {"Qwen2", 96, 160, 2, 1, 64}, {"Qwen3", 80, 208, 1, 1, 128}, {"Qwen2", 80, 48, 5, 1, 16}};
    Comparison compare = {1e-5};
    for (const auto& [family, D, F, H, KV, HD] : models) {
        Model m = random_model(family, D, F, H, KV, HD);
        OnCpu plain(m, 70, 1, 5, {"all"}), vectors(m, 70, 1, 5);
        for (int T : {1, 2, 3, 7, 8, 9, 17, 70}) compare_products(m, plain, vectors, T, compare);
        compare_elements(plain, vectors, 5, compare);
    }
}

TEST_CASE("op by op: attention of the CPU's vectors against the plain op") {
    const struct { const char* family; int G, KV, HD; } models[] = {
        {"Llama", 1, 4, 64}, {"Qwen3", 3, 1, 96}, {"Qwen2", 7, 2, 16}, {"Llama", 16, 1, 128}};
    Comparison compare = {1e-5};
    const Texts texts({150, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130, 33}, 64);
    for (const auto& [family, G, KV, HD] : models) {
        Model m = random_model(family, 64, 64, G * KV, KV, HD);
        OnCpu plain(m, 1000, 16, texts.blocks, {"all"}), vectors(m, 1000, 16, texts.blocks);
        compare_attention(m, plain, vectors, texts, 64, 150, false, compare);
    }
}
#endif
