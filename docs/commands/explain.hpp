// explain: shows what the engine did, step by step, as one HTML page that needs nothing else: which
// tokens each step computed, how the block pool changed, and for every token that was drawn the
// candidates it was drawn from.
//
//   ./nanocu explain models/smollm2 -p "Once upon a time" -n 30 --samples 3 -o page.html
//
// recorder.hpp looks on and notes; the page is explain.html, into which the notes are put.
#pragma once

#include "files.hpp"
#include "openai.hpp"
#include "recorder.hpp"

namespace explain {

const char kPage[] =
#include "explain.html"
    ;

// The record as trace events, for Perfetto or chrome://tracing: a track of steps, one for each
// sequence, and the blocks in use. Times in microseconds.
ordered trace_events(const ordered& record) {
    ordered events = ordered::array();
    auto event = [&](const char* phase, const string& name, double time, size_t track) -> ordered& {
        events.push_back({{"ph", phase}, {"name", name}, {"ts", time * 1e6}, {"pid", 1},
                          {"tid", track}});
        return events.back();
    };
    auto name_of = [&](const ordered& i) { return record["sequences"][size_t(i)]["name"]; };
    event("M", "process_name", 0, 0)["args"] = {{"name", record["model"]}};
    event("M", "thread_name", 0, 0)["args"] = {{"name", "steps"}};
    for (size_t i = 0; i < record["sequences"].size(); i++)
        event("M", "thread_name", 0, i + 1)["args"] = {{"name", str("sequence ",
            record["sequences"][i]["name"].get<string>())}};
    for (size_t i = 0; i < record["steps"].size(); i++) {
        const ordered& step = record["steps"][i];
        double begin = step["begin"], seconds = step["seconds"];
        bool replayed = step["replayed"];
        auto& whole = event("X", str("step ", i + 1, replayed ? ", replayed" : ""), begin, 0);
        whole["dur"] = seconds * 1e6;
        for (const char* key : {"found", "copied", "taken", "freed"})
            whole["args"][key] = step[key];
        event("C", "blocks", begin + seconds, 0)["args"] = step["counts"];
        for (const ordered& part : step["parts"]) {
            auto& e = event("X", part["kind"], begin, size_t(part["sequence"]) + 1);
            e["dur"] = seconds * 1e6;
            e["args"] = {{"begin", part["begin"]}, {"count", part["count"]}};
        }
        for (const ordered& q : step["preempted"]) event("i", "preempted", begin, size_t(q) + 1);
        for (const ordered& pair : step["forked"])
            event("i", str("forked from ", name_of(pair[0]).get<string>()), begin + seconds,
                  size_t(pair[1]) + 1);
    }
    return {{"traceEvents", events}, {"displayTimeUnit", "ms"}};
}

struct Options {  // the run that is asked for, and where to write
    string page, trace, batch;
    vector<string> questions;
} options;

// The questions of a conversation, one after the other.
void run_chat(Session& s, Recorder& recorder, const vector<string>& questions) {
    Chat format = Chat::load(s.f.model);
    format.thinking = !s.f.no_think;
    auto encode = [&](const string& text) { return s.tokenizer->encode(text); };
    vector<int> ids = encode(format.opening(s.f.system.empty() ? nullptr : &s.f.system));
    auto append = [&](const vector<int>& more) { ids.insert(ids.end(), more.begin(), more.end()); };
    for (const string& question : questions) {
        if (interrupted) break;
        append(encode(format.user_turn(question)));
        vector<int> answer = recorder.run({s.request(ids)}, {s.f.stop});
        append(answer);
        append(end_of_turn(format, *s.tokenizer, answer));
    }
}

// All requests of a batch file at a time.
void run_batch(const Session& s, Recorder& recorder, const string& path) {
    std::istringstream lines(read_file(path));
    std::optional<Chat> format;
    vector<Request> requests;
    vector<vector<string>> stops;
    int number = 0;
    for (string line; std::getline(lines, line);) {
        number++;
        if (line.find_first_not_of(" \t\r") == string::npos) continue;
        Job job;
        job.line = number;
        try {
            read_job(s, format, parse_json(line), job);
        } catch (const std::exception& e) {
            fail(path, ": line ", number, ": ", e.what());
        }
        requests.push_back(job.request);
        stops.push_back(job.stops);
    }
    if (requests.empty()) fail(path, ": holds no requests");
    recorder.run(requests, stops);
}

void run(const Flags& f) {
    const Options& what = options;
    int sources = (f.text || !f.file.empty() || !f.ids.empty()) + !what.batch.empty() +
                  !what.questions.empty();
    if (sources > 1) fail("-p, -f, --ids, --chat, --batch: give one of them");
    if (what.page == what.trace) fail(what.page, ": is the page and the trace; give two names");
    std::error_code none;
    for (const string* out : {&what.page, &what.trace})
        for (const string* in : {&what.batch, &f.file})
            if (fs::equivalent(*out, *in, none)) fail(*out, ": is the input, too; give another -o");
    WholeFile page(what.page);
    std::optional<WholeFile> trace;
    if (!what.trace.empty()) trace.emplace(what.trace);
    Session s(f, f.ids.empty());
    Recorder recorder(s);
    if (!what.questions.empty()) run_chat(s, recorder, what.questions);
    else if (!what.batch.empty()) run_batch(s, recorder, what.batch);
    else recorder.run({s.request(input_ids(s))}, {f.stop});

    ordered record = recorder.record();
    string text = record.dump(-1, ' ', true), html = kPage;  // "<" would begin a tag in a page
    for (size_t at = 0; (at = text.find('<', at)) != string::npos;) text.replace(at, 1, "\\u003c");
    const string place = "{{record}}";
    page.finish(html.replace(html.find(place), place.size(), text));
    if (trace) trace->finish(trace_events(record).dump() + "\n");
    size_t tokens = 0, found = 0, copied = 0;
    for (const ordered& q : record["sequences"]) tokens += q["ids"].size();
    for (const ordered& step : record["steps"])
        found += step["found"].size(), copied += step["copied"].size();
    put(str(what.page, ": ", record["steps"].size(), " steps, ", tokens, " tokens, ", found,
            " blocks found in the cache, ", copied, " copied, ", s.engine.preemptions,
            " preemptions\n"));
}

void add_flags(CommandLine& line) {
    Flags& f = line.f;
    line.flag("-o,--output FILE", options.page, "the page")->required();
    line.flag("--trace FILE", options.trace, "the run as a file for Perfetto (ui.perfetto.dev)");
    line.text_flags();
    line.flag("--ids 1,2,3", f.ids, "the text as ids");
    line.flag("--no-special", f.no_special, "add no bos, or what else the tokenizer adds");
    line.flag("--samples N", f.samples, "continuations of the one prompt; else 1", kSize);
    line.flag("--chat TEXT TEXT", options.questions, "questions, asked one after the other")
        ->allow_extra_args();
    line.flag("--system TEXT", f.system, "the system message of --chat");
    line.flag("--no-think", f.no_think, "Qwen3: answer without a thought");
    line.flag("--batch FILE", options.batch, "requests in OpenAI's batch format");
    line.drawing_flags();
    line.engine_flags();
}

const bool kAdded = add_command({"explain",
    "what the engine does, step by step, as an HTML page", add_flags, run});

}  // namespace explain
