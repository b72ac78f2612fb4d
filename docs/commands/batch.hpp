// batch: runs a file of requests in OpenAI's batch format, as `vllm run-batch` reads and writes it.
//
// A line in:   {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}
// A line out:  {"id": ..., "custom_id": "a", "response": {"status_code": 200, "body": {...}}, ...}
//
// Nothing is lost: a result is one write of a whole line, in the order in which requests end. Run
// again with the same output, it skips what is there. A request that is wrong gets a result too,
// with status 400 and the reason.
#pragma once

#include "files.hpp"
#include "openai.hpp"

namespace batch {

struct Options {
    string input, output;
} options;

// The results of a batch, a line each. What a file has already is not done again.
struct Results {
    std::set<string> finished;   // custom_ids
    std::set<int64_t> lines;     // of the input, answered without one, or with a repeated one
    int64_t done = 0, refused = 0;
    LineFile file;

    explicit Results(const string& path)
        : file(path, "{\"id\":\"batch-", [&](const json& j) {
              if (j.contains("line")) lines.insert(j["line"].get<int64_t>());
              else finished.insert(j.at("custom_id").get<string>());
              (j.at("response").at("status_code") == 200 ? done : refused)++;
          }) {}

    // line: of the input, where custom_id does not tell which it was; else 0
    void write(const string& id, const json& custom_id, int64_t line, int status, ordered body) {
        ordered j = {{"id", "batch-" + id}, {"custom_id", custom_id}};
        if (line) j["line"] = line;
        j["response"] = {{"status_code", status}, {"request_id", "req-" + id}, {"body", body}};
        j["error"] = nullptr;
        file.write(dump(j) + "\n");
        (status == 200 ? done : refused)++;
    }
};

void run(const Flags& f) {
    std::ifstream file;
    if (options.input != "-") file.open(options.input, std::ios::binary);
    if (!file || fs::is_directory(options.input)) fail(options.input, ": cannot be read");
    std::error_code none;
    if (fs::equivalent(options.input, options.output, none))
        fail(options.output, ": is the input, too; give another -o");
    std::istream& in = options.input == "-" ? std::cin : file;
    Session s(f);
    Results results(options.output);
    std::optional<Chat> format;
    std::set<string> seen;
    std::map<int, Job> jobs;  // by the engine's number of the request
    int64_t line = 0, tokens = 0;
    int samples = 0;
    double start = now(), shown = 0;
    double bytes = fs::is_regular_file(options.input) ? double(fs::file_size(options.input)) : 0;
    auto name = [&](int64_t of) { return str(std::hex, f.sampling.seed, "-", std::dec, of); };
    auto begin = [&](string text) {
        if (text.find_first_not_of(" \t\r") == string::npos || results.lines.contains(line)) return;
        Job job;
        job.line = line;
        bool repeated = false;
        try {
            json j = parse_json(text);
            if (!j.is_object() || !j.contains("custom_id") || !j["custom_id"].is_string())
                fail("custom_id: expected a text");
            job.id = j["custom_id"];
            repeated = !seen.insert(job.id).second;
            if (repeated) fail("custom_id ", job.id.dump(), " was there before");
            if (results.finished.contains(job.id)) return;
            read_job(s, format, std::move(j), job);
            int number = s.engine.add(job.request);
            samples += job.open;
            jobs.emplace(number, std::move(job));
        } catch (const std::exception& e) {
            results.write(name(line), job.id, repeated || job.id.is_null() ? line : 0, 400,
                error_body(str("line ", line, ": ", reason_of(e)), "invalid_request_error", 400));
        }
    };
    auto progress = [&](bool last) {
        double seconds = now() - start, part = bytes ? double(file.tellg()) / bytes : 0;
        if (!last && (!isatty(2) || seconds < shown + 0.5)) return;
        shown = seconds;
        string left = part > 0 && !last ? str(", ", int(part * 100), "% read, ",
            int(seconds / part - seconds), " s left") : "";
        fprintf(stderr, "%s%ld done, %ld refused, %ld tokens, %.1f tokens/s%s%s",
                isatty(2) ? "\r\33[K" : "", long(results.done), long(results.refused), long(tokens),
                double(tokens) / seconds, left.c_str(), last ? "\n" : "");
    };
    for (bool more = true; (more && !interrupted) || !jobs.empty(); progress(false)) {
        // enough to keep all rows busy, and no more in memory; beyond that only some at a time, so
        // that a GPU works meanwhile
        int rows = s.engine.options.max_rows;
        for (int n = 0; more && !interrupted && samples < (n < 8 ? 2 * rows : rows); n++) {
            string text;
            more = bool(std::getline(in, text));
            line++;
            begin(std::move(text));
        }
        for (Output& o : s.engine.step()) {
            auto found = jobs.find(o.request);
            Job& job = found->second;
            Reply& reply = job.replies[o.sample];
            reply.take(s.engine, o);
            tokens++;
            if (!reply.last.finish) continue;
            samples--;
            if (--job.open) continue;
            string id = name(job.line);
            results.write(id, job.id, 0, 200, response_body(s, job, id));
            jobs.erase(found);
        }
    }
    progress(true);
    if (results.refused && !interrupted)
        fail(results.refused, " of ", results.done + results.refused,
             " requests were refused; their results have status 400 and say why");
}

void add_flags(CommandLine& line) {
    line.argument("INPUT", options.input, "a JSONL file of requests; -: stdin");
    line.flag("-o,--output FILE", options.output, "where results go, a line each; -: stdout")
        ->required();
    line.engine_flags();
}

const bool kAdded = add_command(
    {"batch", "OpenAI batch lines in, results out; run again, it goes on", add_flags, run});

}  // namespace batch
