// An int8 lm_head against the same in double precision, its perplexity, and the memory it takes and
// reads, as the kernel of the operating system counts it.
#include "../checking.hpp"

namespace {

const string kDemo = "models/smollm2";

// Bytes that /proc says are in memory: RssAnon, of our own; RssFile, of mapped files.
double resident(const string& kind) {
    std::ifstream file("/proc/self/status");
    for (string word; file >> word;)
        if (word == kind + ":" && file >> word) return std::stod(word) * 1024;
    fail("/proc/self/status: no ", kind);
}

// The CPU's device, opened: random numbers in x, and their logits.
class OpenDevice : public CpuDevice {
public:
    explicit OpenDevice(const Model& m)
        : CpuDevice(m, {kRows, kRows, 0, false, {}}, PageLayout::by_token(m.config.head_dim),
                    PageLayout::by_token(m.config.head_dim)) {
        std::mt19937 random(3);
        std::normal_distribution<float> draw;
        std::generate_n((float*)x, size_t(kRows) * c.hidden, [&] { return draw(random); });
    }
    vector<float> logits_of(const vector<int>& rows) {
        #pragma omp parallel
        norm_linear(kLmHead, 0, rows.data(), int(rows.size()));
        return {logits + 0, logits + rows.size() * c.vocab};
    }
    std::span<const float> row_0() const { return {(const float*)x, size_t(c.hidden)}; }

private:
    static constexpr int kRows = 9;
};

// The logits of x with the head quantized as asked for, in double.
vector<double> exact_logits(const Model& plain, std::span<const float> x) {
    const Config& c = plain.config;
    vector<double> n(c.hidden), out;
    double squares = 0;
    for (int d = 0; d < c.hidden; d++) squares += double(x[d]) * x[d];
    for (int d = 0; d < c.hidden; d++)
        n[d] = x[d] / std::sqrt(squares / c.hidden + c.norm_eps) * plain.final_norm[d];
    for (int id = 0; id < c.vocab; id++) {
        const bf16* row = plain.lm_head.row(id);
        double most = 0, sum = 0;
        for (int d = 0; d < c.hidden; d++) most = std::max<double>(most, std::abs(float(row[d])));
        float scale = float(most) / 127;
        for (int d = 0; d < c.hidden && most > 0; d++)
            sum += n[d] * std::round(row[d] / scale) * scale;
        out.push_back(sum);
    }
    return out;
}

double worst(std::span<const float> came, std::span<const double> wanted) {
    double most = 0, size = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        double error = std::abs(came[i] - wanted[i]);
        if (!(error <= most)) most = error;  // NaN counts
        size = std::max(size, std::abs(wanted[i]));
    }
    return most / size;
}

double perplexity(const Model& m, const vector<int>& ids) {
    Engine e(m, {.kv_memory = 256 << 20});
    Request r;
    r.prompt = ids;
    r.max_tokens = 1;
    r.score_prompt = true;
    e.add(r);
    double sum = 0;
    while (e.busy())
        for (Output& o : e.step()) for (auto& t : o.prompt_logprobs) sum += t[0].logprob;
    return std::exp(-sum / double(ids.size() - 1));
}

// A folder with the tiny model, where row 5 of the embeddings is zero, as rows of ids that no text
// has often are.
string with_a_zero_row() {
    string to = "build/exercises/7-model", file = to + "/model.safetensors";
    std::filesystem::remove_all(to);
    std::filesystem::copy("tests/data/models/qwen2", to);
    string all = read_file(file);
    uint64_t length;
    memcpy(&length, all.data(), 8);
    json header = json::parse(all.substr(8, length));
    for (const char* name : {"lm_head.weight", "model.embed_tokens.weight"})
        if (header.contains(name)) {
            size_t bytes = header[name]["shape"][1].get<size_t>() * 2;
            size_t at = 8 + length + header[name]["data_offsets"][0].get<size_t>() + 5 * bytes;
            std::fill_n(all.begin() + at, bytes, '\0');
        }
    std::ofstream(file, std::ios::binary) << all;
    return to;
}

// A folder for random weights, with a vocabulary that no eight divides.
string with_odd_vocabulary() {
    string to = "build/exercises/7-odd";
    std::filesystem::create_directories(to);
    json config = json::parse(read_file("tests/data/models/qwen3/config.json"));
    config["vocab_size"] = 509;
    std::ofstream(to + "/config.json") << config;
    return to;
}

template <class M>
void logits_are_right(const string& what, const string& folder, bool dummy) {
    M plain(folder, dummy), quantized(folder, dummy, true);
    OpenDevice int8(quantized), bf16(plain);
    vector<float> came = int8.logits_of({0}), before = bf16.logits_of({0});
    double error = worst(came, exact_logits(plain, bf16.row_0()));
    expect(what + ": logits are those of round(w / scale) * scale, scale = max|w| / 127 of the row",
           error < 1e-4, "a relative error under 0.0001", error);
    expect("... and not those of bf16", came != before, "a difference", "none");
    vector<float> nine = int8.logits_of({0, 1, 2, 3, 4, 5, 6, 7, 8});
    nine.resize(came.size());
    expect("... the same to the bit beside eight other rows", nine == came, "the same", "different");
    M without(folder, dummy, false);
    expect("... and with false nothing has changed", OpenDevice(without).logits_of({0}) == before,
           "the same bits", "different");
}

template <class M>
void check() {
    if constexpr (std::is_constructible_v<M, string, bool, bool>) {
        // first of all, while no memory has been used before
        M plain(kDemo, false);
        double before = resident("RssAnon");
        M quantized(kDemo, false, true);
        double grown = resident("RssAnon") - before, weights = double(plain.embed.rows) * plain.embed.cols;
        expect("an int8 head takes a byte a weight of memory, and a little for scales",
               grown > 0.9 * weights && grown < 1.2 * weights, str(weights / 1e6, " MB"),
               str(grown / 1e6, " MB"));
        auto read = [&](const Model& m) {  // the pages of bf16 weights that the logits touch
            size_t page = getpagesize(), at = (size_t)m.embed.data / page * page;
            size_t bytes = size_t(weights) * 2 / page * page;
            OpenDevice device(m);
            device.logits_of({0});
            madvise((void*)at, bytes, MADV_DONTNEED);
            double start = resident("RssFile");
            device.logits_of({0});
            return resident("RssFile") - start;
        };
        double all = read(plain), still = read(quantized);
        expect("(a bf16 head reads two bytes a weight)", all > 1.8 * weights, 2 * weights / 1e6, all / 1e6);
        expect("with an int8 head nobody reads the bf16 weights", still < 0.05 * weights, "about 0 MB",
               str(still / 1e6, " MB"));

        logits_are_right<M>("demo model", kDemo, false);
        logits_are_right<M>("a row of zeros", with_a_zero_row(), false);
        logits_are_right<M>("a vocabulary of 509", with_odd_vocabulary(), true);

        Tokenizer text(kDemo);
        vector<int> ids = text.encode(read_file("tests/data/smollm2/perplexity.txt"));
        ids.resize(std::min<size_t>(ids.size(), 200));
        double exact = perplexity(plain, ids), came = perplexity(quantized, ids);
        std::cout << "        perplexity of " << ids.size() << " tokens: bf16 " << exact << ", int8 "
                  << came << "\n";
        expect("perplexity is within 1%, and not the same", came != exact &&
               std::abs(came / exact - 1) < 0.01, exact, came);
    } else {
        expect("Model has a constructor (folder, dummy, int8_head)", false,
               "Model(const string& folder, bool dummy = false, bool int8_head = false)",
               "no such constructor");
    }
}

}  // namespace

int main() {
    omp_set_num_threads(1);
    check<Model>();
    return done();
}
