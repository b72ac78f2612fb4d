// tune: which --threads, --max-rows and --chunk are best on this machine for the requests of a
// file, and MODEL/nanocu.json, where all commands find them afterwards (settings.hpp).
//
// Times on a machine with other work are noisy, so nothing is compared but what ran side by side: a
// round runs the settings so far, each candidate, and the settings so far once more. What counts is
// a candidate's time over theirs in the same round, in the median of all rounds, and the noise is
// how far their own two times are apart. A candidate is taken if it is faster by more than that.
// The best of many may have been lucky, so at last it meets the defaults again, in rounds of their
// own, and it is kept only if it wins these, too.
#pragma once

#include "bench.hpp"
#include "files.hpp"
#include "openai.hpp"
#include "settings.hpp"

namespace tune {

struct Options {
    string workload;
    int rounds = 5;
    bool dry = false;
} options;

struct Setting {
    int threads, rows, chunk;
    bool operator==(const Setting&) const = default;
    string text() const { return str("threads ", threads, ", max-rows ", rows, ", chunk ", chunk); }
};

double median(vector<double> v) {
    std::ranges::sort(v);
    size_t n = v.size();
    return n ? (v[n / 2] + v[(n - 1) / 2]) / 2 : 1;
}

// The requests of a file: lengths as of bench --workload, or lines as of batch.
vector<Job> read_jobs(const Flags& f) {
    string text = read_file(options.workload);
    Flags own = f;
    if (!own.kv_memory) own.kv_memory = 1 << 28;  // this engine only knows the context
    size_t first = text.find_first_not_of(" \t\r\n");
    bool lines = first != string::npos && text[first] == '{';
    Session s(own);
    vector<Job> jobs;
    std::optional<Chat> format;
    std::istringstream in(text);
    bench::Workload lengths;
    if (!lines) lengths = bench::read_workload(options.workload, s.engine.context);
    for (auto [prompt, count] : lengths) {
        jobs.emplace_back().request = bench::request(s, prompt, count);
        jobs.back().request.sampling.temperature = 0.6f;  // as bench has it
    }
    for (string line; lines && std::getline(in, line);) {
        if (line.find_first_not_of(" \t\r") == string::npos) continue;
        jobs.emplace_back();
        jobs.back().line = int64_t(jobs.size());
        in_file(str(options.workload, ": request ", jobs.size()), [&] {
            read_job(s, format, parse_json(line), jobs.back());
        });
        jobs.back().replies.clear();  // they know the session's tokenizer
    }
    return jobs;
}

class Tuner {
public:
    Tuner(const Flags& f, int rounds)
        : f(f), rounds(rounds), jobs(read_jobs(f)), model(f.model, f.load == "dummy") {
        if (fs::exists(f.model + "/tokenizer.json")) tokenizer.emplace(f.model);
        Flags untouched = f;  // by an earlier run's settings
        untouched.max_rows = untouched.chunk = 0;
        Engine engine(model, untouched);
        defaults = {omp_get_num_procs(), engine.options.max_rows, engine.options.chunk};
        gpu = engine.device->overlaps;
        for (const Job& job : jobs) {
            rows += job.request.samples;
            tokens += int(job.request.prompt.size()) + job.request.samples;
        }
    }

    Setting defaults;
    double gain = 1, noise = 1;

    // The best setting found: one value after the other, each against the best so far.
    Setting search() {
        fprintf(stderr, "%zu requests; defaults: %s\n", jobs.size(), defaults.text().c_str());
        Setting best = defaults;
        seconds(best);  // to warm up
        int cores = defaults.threads;
        if (!gpu) try_values(best, &Setting::threads, {1, cores / 4, cores / 2, cores * 3 / 4});
        try_values(best, &Setting::rows, {16, 32, 64, 128, 256, 512});
        try_values(best, &Setting::chunk, {64, 128, 256, 512, 1024, 2048, 4096, 8192});
        if (best == defaults || interrupted) return defaults;
        vector<double> ratios, apart;
        for (int i = 0; i < rounds + 2 && !interrupted; i++) {
            double a = seconds(defaults), b = seconds(best);
            double c = seconds(best), d = seconds(defaults);
            ratios.push_back((a + d) / (b + c));
            apart.push_back(std::abs(std::log(a / d)));
            apart.push_back(std::abs(std::log(b / c)));
        }
        gain = median(ratios), noise = std::exp(median(apart));
        auto [least, most] = std::ranges::minmax(ratios);
        fprintf(stderr, "%s: %.3f times as fast as the defaults (%.3f to %.3f), noise %.3f\n",
                best.text().c_str(), gain, least, most, noise);
        return gain > noise ? best : defaults;
    }

private:
    // All requests at a time, from the first step to the last.
    double seconds(const Setting& s) {
        EngineOptions o = f;
        o.max_rows = s.rows, o.chunk = s.chunk;
        omp_set_num_threads(s.threads);
        Engine engine(model, o);
        const Tokenizer* text = tokenizer ? &*tokenizer : nullptr;
        std::map<int, vector<Reply>> replies;  // by the engine's number; they see to stop strings
        for (const Job& job : jobs)
            replies[engine.add(job.request)].assign(job.request.samples,
                                                    Reply{TextStream(text, job.stops)});
        double start = now();
        while (engine.busy() && !interrupted)
            for (Output& out : engine.step()) replies[out.request][out.sample].take(engine, out);
        return now() - start;
    }

    // More rows than texts, or a chunk of more than all their tokens, change nothing.
    Setting used(Setting s) const {
        return {s.threads, std::min(s.rows, rows), std::min(s.chunk, tokens)};
    }

    // Sets best's value to the one of values that is fastest, if it is faster than the noise.
    void try_values(Setting& best, int Setting::* value, const vector<int>& values) {
        struct Candidate {
            Setting setting;
            vector<double> ratios = {};  // its time to the best's, round by round
        };
        vector<Candidate> all;
        vector<double> apart;
        for (int v : values) {
            Setting s = best;
            s.*value = v;
            auto same = [&](const Candidate& c) { return used(c.setting) == used(s); };
            if (v < 1 || used(s) == used(best) || std::ranges::any_of(all, same)) continue;
            all.push_back({s});
        }
        for (int i = 0; i < rounds && !all.empty() && !interrupted; i++) {
            double before = seconds(best);
            vector<double> times;
            for (const Candidate& c : all) times.push_back(seconds(c.setting));
            double after = seconds(best);
            apart.push_back(std::abs(std::log(before / after)));
            for (size_t j = 0; j < all.size(); j++)
                all[j].ratios.push_back(2 * times[j] / (before + after));
            std::erase_if(all, [&](const Candidate& c) {  // far behind: need not run again
                bool hopeless = median(c.ratios) > 1.25 * std::exp(median(apart));
                if (hopeless) report(c.setting, c.ratios, apart);
                return hopeless;
            });
        }
        double fastest = std::exp(-median(apart));
        for (const Candidate& c : all) {
            if (interrupted) return;
            report(c.setting, c.ratios, apart);
            if (median(c.ratios) >= fastest) continue;
            fastest = median(c.ratios);
            best = c.setting;
        }
    }

    static void report(const Setting& s, const vector<double>& ratios,
                       const vector<double>& apart) {
        fprintf(stderr, "  %-42s %.3f of the time (%zu rounds), noise %.3f\n", s.text().c_str(),
                median(ratios), ratios.size(), std::exp(median(apart)));
    }

    const Flags& f;
    int rounds;
    vector<Job> jobs;
    Model model;
    std::optional<Tokenizer> tokenizer;
    bool gpu;
    int rows = 0, tokens = 0;  // that could be in a step
};

// Sets this machine's entry in MODEL/nanocu.json; an empty one is taken out. Others stay.
void write_settings(const Flags& f, const ordered& entry) {
    string path = f.model + "/nanocu.json";
    ordered all = ordered::object();
    with_json(path, [&](const json& j) { all = j; }, true);
    all.erase(settings::machine(f.device));
    if (!entry.empty()) all[settings::machine(f.device)] = entry;
    if (all.empty() && !fs::exists(path)) return;
    if (all.empty()) fs::remove(path);
    else WholeFile(path).finish(all.dump(2) + "\n");
}

void run(const Flags& f) {
    const bool dry = options.dry;
    Tuner tuner(f, options.rounds);
    Setting best = tuner.search();
    if (interrupted) return;
    ordered entry;
    if (best != tuner.defaults)
        entry = {{"threads", best.threads}, {"max-rows", best.rows}, {"chunk", best.chunk}};
    if (!dry) write_settings(f, entry);
    if (entry.empty()) return put("the defaults stay: nothing was faster by more than the noise\n");
    put(str("best: ", best.text(), std::fixed, std::setprecision(3), "; ", tuner.gain,
            " times as fast as the defaults", dry ? "" : str(", now in ", f.model, "/nanocu.json"),
            "\n"));
}

void add_flags(CommandLine& line) {
    line.flag("--workload FILE", options.workload,
              "lengths as of bench --workload, or a JSONL batch file")->required();
    line.flag("--rounds N", options.rounds, "comparisons; else 5", CLI::Range(1, 1000));
    line.flag("--dry-run", options.dry, "write nothing");
    line.flag("--device NAME", line.f.device, "auto (the default), cpu, cuda or cuda:1");
    line.flag("--kv-memory SIZE", line.f.kv_memory, "of the cache, as 512M",
              CLI::AsSizeValue(false));
    line.flag("--max-context N", line.f.max_context, "fewer tokens than the model allows", kSize);
    line.flag("--without NAME,NAME", line.f.without, "turn these optimizations off; all: every one")
        ->delimiter(',');
}

const bool kAdded = add_command({"tune",
    "the fastest rows, chunk and threads for a workload on this machine", add_flags, run});

}  // namespace tune
