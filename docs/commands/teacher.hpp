// teacher: the likeliest next ids and their log-probabilities behind every token of a corpus, as
// a data set to train a smaller model on (distillation, Hinton et al. 2015).
//
// A text is cut into chunks of --context ids. With --overlap a chunk begins with so many ids of the
// one before it, which are there to be read only: what follows them was told there already.
//
// A line out: {"chunk": number, "ids": [N ids], "first": F, "top_ids": [N - F lists of k ids],
//              "top_logprobs": [the same, natural logarithms, rounded to 5 places]}
// List i tells what comes behind ids[F + i]: of i = 0 the id ids[F + 1] is one outcome.
//
// A line is written whole, in the order of chunks. Run again with the same output, it goes on where
// it was, after Ctrl-C, kill -9 or a full disk; on a CPU to the same bytes as without a break.
#pragma once

#include "files.hpp"

namespace teacher {

struct Options {
    string corpus, output;
    bool jsonl = false;
    int k = 16, context = 512, overlap = 0;
} options;

struct Chunk {
    int64_t number = -1;
    vector<int> ids;
    int first = 0;  // of the ids behind which something is to be told
};

// The chunks of a corpus, one after the other: a text, or a text a line in JSON.
class Corpus {
public:
    Corpus(const Session& s, int context, int overlap)
        : s(s), context(context), overlap(overlap), file(options.corpus, std::ios::binary) {
        if (!file || fs::is_directory(options.corpus)) fail(options.corpus, ": cannot be read");
        if (context > s.engine.context)
            fail("--context ", context, ": the model's is ", s.engine.context);
        if (overlap >= context) fail("--overlap ", overlap, ": less than --context is expected");
    }

    // Moves c on to the next chunk; false at the end.
    bool next(Chunk& c) {
        while (begin + (begin ? overlap : 0) >= int64_t(ids.size()))
            if (!next_text()) return false;
        auto at = ids.begin() + begin, end = at + std::min<int64_t>(context, ids.end() - at);
        c = {c.number + 1, {at, end}, begin ? overlap : 0};
        begin += context - overlap;
        return true;
    }

private:
    bool next_text() {
        string text;
        begin = 0;
        ids.clear();
        if (!options.jsonl && line++) return false;
        if (!options.jsonl) text = str(file.rdbuf());
        else if (!std::getline(file, text)) return false;
        else if (line++; text.find_first_not_of(" \t\r") == string::npos) return true;
        try {
            if (json j; options.jsonl) {
                j = parse_json(text);
                text = j.is_object() ? j.at("text") : j;
            }
            ids = s.tokenizer->encode(text, !s.f.no_special);
        } catch (const json::exception&) {
            fail(options.corpus, ": line ", line, ": no JSON string, nor an object with \"text\"");
        } catch (const std::exception& e) {
            fail(options.corpus, options.jsonl ? str(": line ", line) : "", ": ", e.what());
        }
        return true;
    }

    const Session& s;
    const int context, overlap;
    std::ifstream file;
    int64_t line = 0, begin = 0;  // read; of the next chunk in ids
    vector<int> ids;              // of one text
};

// The line of a chunk from what comes behind its ids; the last is told apart from the others.
ordered line_of(const Chunk& c, const Output& o) {
    ordered j = {{"chunk", c.number}, {"ids", c.ids}, {"first", c.first},
                 {"top_ids", ordered::array()}, {"top_logprobs", ordered::array()}};
    auto add = [&](std::span<const TokenLogprob> of_token) {
        ordered ids = ordered::array(), logprobs = ids;
        for (const TokenLogprob& t : of_token.subspan(1)) {  // the first is of the id itself
            ids.push_back(t.id);
            logprobs.push_back(std::round(t.logprob * 1e5) / 1e5);
        }
        j["top_ids"].push_back(std::move(ids));
        j["top_logprobs"].push_back(std::move(logprobs));
    };
    for (const auto& of_token : o.prompt_logprobs) add(of_token);
    add(o.logprobs);
    return j;
}

Request request_of(const Chunk& c, int k) {
    Request r;
    r.prompt = c.ids;
    r.score_prompt = true;
    r.score_from = c.first + 1;
    r.max_tokens = 1;
    r.logprobs = k;
    return r;
}

// The last line there is, computed again: another model does not get on with its work.
void check_model(Engine& engine, const Chunk& c, const json& last, int k, const string& path) {
    json again;
    for (engine.add(request_of(c, k)); engine.busy() && !interrupted;)
        for (const Output& o : engine.step()) again = line_of(c, o)["top_logprobs"];
    if (interrupted) return;
    for (size_t i = 0; i < again.size(); i++)
        for (size_t n = 0; n < again[i].size(); n++) {
            double old = last.at("top_logprobs").at(i).at(n), value = again[i][n];
            if (std::abs(old - value) > 0.1)  // on a GPU the bits depend on the batch
                fail(path, ": is from another model; give another -o");
        }
}

void run(const Flags& f) {
    const int k = options.k;
    Session s(f, true);
    Corpus corpus(s, options.context, options.overlap);
    std::error_code none;
    if (fs::equivalent(options.corpus, options.output, none))
        fail(options.output, ": is the corpus; give another -o");
    Chunk c;
    json last;
    LineFile out(options.output, "{\"chunk\":", [&](json& j) {
        bool same = corpus.next(c) && j.at("ids") == c.ids && j.at("first") == c.first;
        if (!same || j.at("top_ids").at(0).size() != size_t(k))
            fail("chunk ", j.at("chunk"), " is of another corpus or settings; give another -o");
        last = std::move(j);
    });
    if (!last.is_null()) check_model(s.engine, c, last, k, options.output);
    std::map<int, Chunk> running;          // by the engine's number of the request
    std::map<int64_t, string> finished;    // lines, by the chunk's number
    int64_t written = c.number + 1, tokens = 0, there = written;
    double start = now(), shown = start;
    for (bool more = true; (more || !running.empty()) && !interrupted;) {
        while (more && int(running.size()) < s.engine.options.max_rows)
            if ((more = corpus.next(c))) running[s.engine.add(request_of(c, k))] = c;
        for (const Output& o : s.engine.step()) {
            auto done = running.extract(o.request);
            const Chunk& chunk = done.mapped();
            tokens += int64_t(chunk.ids.size());
            finished[chunk.number] = line_of(chunk, o).dump() + "\n";
        }
        for (; !finished.empty() && finished.begin()->first == written; written++) {
            out.write(finished.begin()->second);
            finished.erase(finished.begin());
        }
        bool end = !more && running.empty();
        if (!end && (!isatty(2) || now() < shown + 0.5)) continue;
        shown = now();
        fprintf(stderr, "%s%ld chunks, %ld of them from before, %.1f tokens/s%s",
                isatty(2) ? "\r\33[K" : "", long(written), long(there),
                double(tokens) / (shown - start), end ? "\n" : "");
    }
}

void add_flags(CommandLine& line) {
    line.argument("CORPUS", options.corpus, "a text file");
    line.flag("--jsonl", options.jsonl,
              "the corpus is texts, a line each: a JSON string, or an object with \"text\"");
    line.flag("-o,--output FILE", options.output, "a line for each chunk; -: stdout")->required();
    line.flag("-k K", options.k, "how many of the likeliest; else 16", CLI::Range(1, 1000));
    line.flag("--context N", options.context, "ids of a chunk; else 512", kSize);
    line.flag("--overlap N", options.overlap, "ids that a chunk has from the one before; else none",
              CLI::Range(0, 1 << 24));
    line.flag("--no-special", line.f.no_special, "add no bos in front of a text");
    line.engine_flags();
}

const bool kAdded = add_command({"teacher",
    "a model's likeliest next ids behind every token of a corpus", add_flags, run});

}  // namespace teacher
