// bench: how fast a model is here. Rows of prompts (pp) and of decoding (tg), each beside what the
// machine allows; a workload of many requests; or --chapters, what each optimization gains.
#pragma once

#include "limits.hpp"
#include "objects.hpp"

namespace bench {

struct Options {
    vector<int> pp, tg, rows, depth = {16};
    string workload;
    bool chapters = false;
} options;

// A request for exactly so many new tokens. Every prompt begins differently: nothing is reused.
Request request(const Session& s, int prompt, int tokens) {
    static int id = 0;
    Request r = s.request(vector<int>(prompt));
    for (int& t : r.prompt) t = id = (id + 7919) % s.model.config.vocab;
    r.max_tokens = tokens;
    r.ignore_eos = true;
    return r;
}

// Runs what was added to its end or to Ctrl-C; the tokens that came.
double run_to_end(Engine& engine) {
    double tokens = 0;
    while (engine.busy() && !interrupted) tokens += double(engine.step().size());
    return tokens;
}

// Tokens a second: of computing one prompt (tokens 0), or of decoding that many in each of some
// rows, from when all prompts are computed.
double once(Session& s, int rows, int prompt, int tokens) {
    for (int i = 0; i < rows; i++) s.engine.add(request(s, prompt, tokens + 1));
    double start = now(), counted = prompt;
    while (s.engine.busy() && !interrupted && int(s.engine.step().size()) < rows) {}
    if (tokens) {
        start = now();
        counted = 0;
    }
    counted += run_to_end(s.engine);
    return counted / (now() - start);
}

struct Rates {
    double least, middle, most;
};

// Of three runs, behind one to warm up.
Rates rates(Session& s, int rows, int prompt, int tokens) {
    double rate[4];
    for (double& r : rate) r = once(s, rows, prompt, tokens);
    std::sort(rate + 1, rate + 4);
    return {rate[1], rate[2], rate[3]};
}

using Workload = vector<std::pair<int, int>>;  // tokens of a prompt, new ones

// From a file with a line each.
Workload read_workload(const string& path, int context) {
    std::istringstream file(read_file(path));
    Workload lengths;
    for (int prompt, count = 0; file >> prompt; lengths.push_back({prompt, count}))
        if (!(file >> count) || prompt < 1 || count < 1 || prompt + count > context)
            fail(path, ": request ", lengths.size() + 1, " is not two lengths that fit");
    if (lengths.empty() || !file.eof()) fail(path, ": expected lengths, a pair a line");
    return lengths;
}

// All requests at a time, temperature 0.6.
void run_workload(Session& s, const Workload& lengths) {
    s.engine.add(request(s, lengths[0].first, 2));  // to warm up
    run_to_end(s.engine);
    for (auto [prompt, count] : lengths) {
        Request r = request(s, prompt, count);
        r.sampling.temperature = 0.6f;
        s.engine.add(r);
    }
    double start = now(), tokens = 0;
    std::pair<int, int> peak;  // blocks, unused slots
    while (s.engine.busy() && !interrupted) {
        tokens += double(s.engine.step().size());
        peak = std::max(peak, s.engine.memory_use());
    }
    double seconds = now() - start, slots = double(peak.first) * kBlockSize;
    if (interrupted) return;
    put_object({{"workload", options.workload}, {"seconds", seconds}, {"new_tokens", tokens},
        {"tokens_per_s", tokens / seconds}, {"preemptions", s.engine.preemptions},
        {"blocks_at_peak", peak.first}, {"unused_at_peak", peak.second / slots}}, s.f.json);
}

// Fails if rows sequences of so many tokens can't all be decoded at a time.
void check_fits(const Session& s, int rows, int tokens) {
    const Engine& e = s.engine;
    if (tokens > e.context)
        fail("bench: ", tokens, " tokens do not fit into the context of ", e.context);
    if (rows > e.options.max_rows)
        fail("--rows ", rows, ": only ", e.options.max_rows, " run at a time; raise --max-rows");
    if (int64_t(rows) * Cache::blocks_for(tokens) > e.cache.blocks())
        fail("--rows ", rows, ": ", tokens, " tokens each do not fit into KV memory for ",
             e.cache.blocks() * kBlockSize, "; raise --kv-memory");
}

// One row: prompts (tokens 0), or decoding behind so many tokens.
void run_row(Session& s, const Limits& limits, int rows, int prompt, int tokens) {
    const Config& c = s.model.config;
    Rates rate = rates(s, rows, prompt, tokens);
    if (interrupted) return;
    // decoding is limited by reading all weights and the cache once a step, a prompt by
    // multiplying with all but lm_head; of an embedding of its own, either uses a row a token
    double bytes = double(s.model.weights.bytes), embedding = 2.0 * c.vocab * c.hidden;
    double flops = bytes - embedding * (c.tied ? 1 : 2);
    double read = bytes - (c.tied ? 0 : embedding);
    read += (prompt + tokens / 2.0) * rows * double(s.engine.device->token_bytes());
    double done = tokens ? rate.middle / rows * read : rate.middle * flops;  // a second
    double of_limit = done / (tokens ? limits.bytes : limits.flops);
    const char* limit = tokens ? "read bandwidth" : "peak";
    string unit = tokens ? "GB" : "GFLOP";
    string test = tokens ? str("tg", tokens, "@", prompt, " x ", rows) : str("pp", prompt);
    if (s.f.json) put_object({{"test", test}, {"rows", rows}, {"tokens_per_s", rate.middle},
        {"least", rate.least}, {"most", rate.most}, {unit + "_per_s", done / 1e9},
        {"of_limit", of_limit}, {"limit", limit}}, true);
    else put(str(std::left, std::setw(16), test, " ", std::fixed, std::setprecision(1), rate.middle,
        " tokens/s (", rate.least, " to ", rate.most, "), ", done / 1e9, " ", unit, "/s, ",
        of_limit * 100, "% of ", limit, "\n"));
}

// ---------------------------------------------------------------------------------------------
// --chapters: what each optimization gains. The first row has none of them, each row one more.

// Tokens a second of requests that begin alike: 15 of 16 tokens of each prompt are the same.
double shared_rate(Session& s, int requests, int prompt, int tokens) {
    Request first = request(s, prompt, tokens);
    s.engine.add(first);
    run_to_end(s.engine);
    for (int i = 0; i < requests; i++) {
        Request r = request(s, prompt, tokens);
        std::copy_n(first.prompt.begin(), prompt / 16 * 15, r.prompt.begin());
        s.engine.add(r);
    }
    double start = now();
    return run_to_end(s.engine) / (now() - start);
}

// One configuration: a row of the table, or an object.
void run_chapter(const Flags& f, const string& name, const Options& o) {
    Session s(f);
    int most = std::ranges::max(o.rows), pp = o.pp[0], tg = o.tg[0], depth = o.depth[0];
    check_fits(s, most, depth + tg + 1);
    check_fits(s, 1, pp + 1);
    ordered j = {{"with", name}};
    string row = str(std::left, std::setw(20), name, std::right, std::fixed, std::setprecision(1));
    auto add = [&](const string& key, double value) {
        j[key] = value;
        row += str(std::right, std::fixed, std::setprecision(1), " ", std::setw(11), value);
    };
    for (int rows : o.rows) add(str("tokens_per_s x ", rows), rates(s, rows, depth, tg).middle);
    add("prompt_ms", 1e3 * pp / rates(s, 1, pp, 0).middle);
    add("shared_tokens_per_s", shared_rate(s, most, pp / 2, tg));
    if (!interrupted) put(f.json ? j.dump() + "\n" : row + "\n");
}

void run_chapters(const Flags& f, Options o) {
    vector<string> all;
    {
        Session s(f);  // only to ask
        bool gpu = s.engine.device->overlaps;
        all = s.engine.device->chapters;
        if (o.rows.empty()) o.rows = gpu ? vector{1, 8, 64, 256} : vector{1, 8, 32};
        if (o.pp.empty()) o.pp = {gpu ? 2048 : 256};
        if (o.tg.empty()) o.tg = {gpu ? 128 : 16};
        check_fits(s, std::ranges::max(o.rows), o.depth[0] + o.tg[0] + 1);
        check_fits(s, 1, o.pp[0] + 1);
    }
    string head = str(std::left, std::setw(20), "with", std::right);
    for (int rows : o.rows) head += str(" ", std::setw(11), str("x ", rows));
    head += str(" ", std::setw(11), str("pp", o.pp[0], " ms"), " ", std::setw(11), "shared");
    if (!f.json) put(str("tokens/s of decoding x rows, ms of a prompt, tokens/s of ",
        std::ranges::max(o.rows), " prompts that begin alike\n\n", head, "\n"));
    for (size_t n = 0; n <= all.size() && !interrupted; n++) {
        Flags some = f;
        some.without.assign(all.begin() + n, all.end());
        run_chapter(some, n ? "+ " + all[n - 1] : "none", o);
    }
}

void run(const Flags& f) {
    Options o = options;
    if (o.chapters && !o.workload.empty()) fail("--chapters, --workload: give one of them");
    if (o.chapters && (o.pp.size() > 1 || o.tg.size() > 1 || o.depth.size() > 1))
        fail("--chapters: takes one --pp, one --tg and one --depth");
    if (o.chapters && !f.without.empty()) fail("--chapters: chooses --without itself");
    if (o.chapters) return run_chapters(f, o);
    if (o.pp.empty()) o.pp = {512};
    if (o.tg.empty()) o.tg = {128};
    if (o.rows.empty()) o.rows = {1, 8};
    Session s(f);
    s.request({}).sampling.check();
    int longest = std::ranges::max(o.tg) + std::ranges::max(o.depth) + 1;
    Workload workload;
    if (!o.workload.empty()) workload = read_workload(o.workload, s.engine.context);
    else check_fits(s, 1, std::ranges::max(o.pp) + 1);
    if (workload.empty()) check_fits(s, std::ranges::max(o.rows), longest);
    Limits limits = measure(s);
    put_object({{"device", s.engine.device->name}, {"threads", f.threads},
                {"weight_MB", double(s.model.weights.bytes) / 1e6},
                {"read_GB_per_s", limits.bytes / 1e9}, {"peak_GFLOP_per_s", limits.flops / 1e9}},
               f.json);
    if (!workload.empty()) return run_workload(s, workload);
    for (int pp : o.pp) run_row(s, limits, 1, pp, 0);
    for (int tg : o.tg)
        for (int depth : o.depth)
            for (int rows : o.rows) run_row(s, limits, rows, depth, tg);
}

void add_flags(CommandLine& line) {
    json_flag(line);
    line.flag("--pp N,N", options.pp, "prompt lengths; else 512", kSize);
    line.flag("--tg N,N", options.tg, "tokens to decode; else 128", kSize);
    line.flag("--depth N,N", options.depth, "tokens before those; else 16", kSize);
    line.flag("--rows N,N", options.rows, "sequences at a time; else 1,8", kSize);
    line.flag("--workload FILE", options.workload, "prompt and output lengths, a pair a line");
    line.flag("--chapters", options.chapters, "what each optimization gains, one after the other");
    line.group("what is drawn");
    line.truncation_flags();
    line.engine_flags();
}

const bool kAdded = add_command({"bench", "speed of prompts (pp) and of decoding (tg)",
    add_flags, run});

}  // namespace bench
