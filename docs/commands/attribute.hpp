// attribute: which parts of a prompt caused its answer. The prompt is cut into segments; with
// some of them left out, the answer's log-probability changes, and that is what they did for it.
//
//   leave-one-out  the drop when only this segment is missing; one that another repeats has none
//   shapley        the segment's mean gain over random orders in which all come in one by one
//                  (Shapley 1953; sampled as Castro et al. 2009, Strumbelj and Kononenko 2010): in
//                  each order the gains add up to the difference of all segments and none
//
// Each set of segments is a variant of the prompt. All variants run as one batch, and what they
// have in common at their beginnings is computed once.
#pragma once

#include "answers.hpp"
#include "files.hpp"

namespace attribute {

struct Options {
    string answer, by = "sentence", method = "leave-one-out", page;
    int samples = 20;
    bool separate = false, chat = false;
} options;

struct Piece {
    string text, gap;  // gap: the white space behind it
    bool fixed;        // in all variants, as it is no segment
    double value = 0, error = 0;  // the attribution and its standard error, in nats
};

using Kept = vector<bool>;  // which segments a variant has

// The pieces of a prompt: every match of a pattern is a segment.
vector<Piece> cut(const string& text, const string& by) {
    static const std::map<string, Regex> patterns = {
        {"word", compile("\\S+\\s*")},
        {"sentence",
         compile(R"((?s)\S.*?([.!?]["')\]”’»]*(\s+|\z)|[。！？]\s*|\s*\n\s*|\z))")},
        {"segment", compile(R"((?s)\[\[.*?\]\]\s*)")}};
    static const Regex space = compile("\\s+\\z");
    vector<Piece> pieces;
    split(patterns.at(by), text, [&](std::string_view part, bool matches) {
        string gap = find_last(space, part), piece(part.substr(0, part.size() - gap.size()));
        if (by == "segment" && matches) piece = piece.substr(2, piece.size() - 4);
        else if (by == "segment" && (piece.find("[[") + 1 || piece.find("]]") + 1))
            fail("prompt: a [[ or ]] without its other half");
        pieces.push_back({piece, gap, !matches});
    });
    if (std::ranges::all_of(pieces, &Piece::fixed))
        fail("prompt: no segment; ", by == "segment" ? "mark some: [[so]]" : "give some text");
    return pieces;
}

// The text with some segments left out, each with the white space behind it; the end stays.
string variant(const vector<Piece>& pieces, const Kept& kept) {
    string text;
    const Piece* last = nullptr;
    for (size_t segment = 0; const Piece& p : pieces) {
        if (!p.fixed && !kept[segment++]) continue;
        text += (last ? last->gap : "") + p.text;
        last = &p;
    }
    return text + (last ? pieces.back().gap : "");
}

// Numbers the variants that are asked for, each once.
struct Variants {
    vector<Kept> all;
    std::map<Kept, int> number;
    int operator()(const Kept& kept) {
        auto [entry, is_new] = number.emplace(kept, int(all.size()));
        if (is_new) all.push_back(kept);
        return entry->second;
    }
};

// What to subtract for the value of each segment: pairs of variants, with it and without.
using Gains = vector<vector<std::pair<int, int>>>;  // [segments, 1 or samples]

Gains leave_one_out(int n, Variants& variants) {
    Gains gains(n);
    Kept all(n, true);
    for (int i = 0; i < n; i++) {
        Kept kept = all;
        kept[i] = false;
        gains[i] = {{variants(all), variants(kept)}};
    }
    return gains;
}

Gains shapley(int n, int samples, uint64_t seed, Variants& variants) {
    Gains gains(n);
    vector<int> order(n);
    for (int sample = 0; sample < samples; sample++) {
        std::iota(order.begin(), order.end(), 0);
        for (int i = n; i > 1; i--) {  // Fisher and Yates
            int other = int(philox(seed, uint32_t(sample), uint32_t(i)) % unsigned(i));
            std::swap(order[i - 1], order[other]);
        }
        Kept kept(n, false);
        for (int before = variants(kept), after; int i : order) {
            kept[i] = true;
            after = variants(kept);
            gains[i].push_back({after, before});
            before = after;
        }
    }
    return gains;
}

// Mean and standard error of the gains.
void set_values(vector<Piece>& pieces, const Gains& gains, const vector<double>& logprobs) {
    for (size_t segment = 0; Piece& p : pieces) {
        if (p.fixed) continue;
        const auto& pairs = gains[segment++];
        double sum = 0, squares = 0, n = double(pairs.size());
        for (auto [with, without] : pairs) sum += logprobs[with] - logprobs[without];
        p.value = sum / n;
        for (auto [with, without] : pairs)
            squares += std::pow(logprobs[with] - logprobs[without] - p.value, 2);
        p.error = n > 1 ? std::sqrt(squares / (n - 1) / n) : 0;
    }
}

string in_html(const string& text) {
    string out;
    for (char c : text)
        if (c && strchr("<>&\"", c)) out += str("&#", int(c), ";");
        else if (c == '\n' || c == '\t' || !iscntrl((unsigned char)c)) out += c;
    return out;
}

string number(double value) { return str(std::fixed, std::setprecision(2), value); }

constexpr const char* kPage = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What caused the answer</title><style>
:root { --up: 232 119 34; --down: 60 120 230; }
body { font: 1rem/1.6 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
.prompt { line-height: 2.1; overflow-wrap: anywhere; white-space: pre-wrap; }
.up, .down { border-radius: .2em; padding: .15em .1em; }
.up { background: rgb(var(--up) / calc(var(--share) * .6)); }
.down { background: rgb(var(--down) / calc(var(--share) * .6)); }
sub { font-size: .7em; padding-left: .2em; white-space: nowrap; }
table { border-collapse: collapse; text-align: left; }
th, td { border-bottom: 1px solid #8886; padding: .2em .6em; vertical-align: top; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
td:first-child { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
</style></head><body><main>
<h1>What caused the answer</h1>
)";

// The prompt as a heat map, and a table of the same values.
string page(const Options& o, const vector<Piece>& pieces, const string& answer, double logprob) {
    double most = 1e-9;
    for (const Piece& p : pieces) most = std::max(most, std::abs(p.value));
    string map, rows;
    for (const Piece& p : pieces) {
        string text = in_html(p.text), value = number(p.value);
        if (o.method == "shapley") value += " ± " + number(p.error);
        map += p.fixed ? text : str("<span class=\"", p.value < 0 ? "down" : "up",
            "\" style=\"--share: ", number(std::abs(p.value) / most), "\">", text, "<sub>",
            number(p.value), "</sub></span>");
        map += in_html(p.gap);
        if (!p.fixed) rows += str("<tr><td>", value, "</td><td>", text, "</td></tr>\n");
    }
    return str(kPage, "<p>The answer <q>", in_html(answer), "</q> has log-probability ",
        number(logprob), " behind this prompt. A segment's value, in nats, is ",
        o.method == "shapley" ? "its mean gain over random orders in which the segments come in"
                              : "the drop when it alone is left out",
        "; orange speaks for the answer, blue against it.</p>\n<p class=\"prompt\" dir=\"auto\">",
        map, "</p>\n<table><thead><tr><th scope=\"col\">Value</th>"
        "<th scope=\"col\">Segment</th></tr></thead><tbody>\n", rows,
        "</tbody></table>\n</main></body></html>\n");
}

void run(const Flags& f) {
    const Options& o = options;
    double start = now();
    std::optional<Chat> format;
    if (o.chat) format = Chat::load(f.model);
    Session s(f, true);
    const Tokenizer& tokenizer = *s.tokenizer;
    vector<Piece> pieces = cut(input_text(f), o.by);
    int n = int(std::ranges::count(pieces, false, &Piece::fixed));
    Variants variants;
    variants(Kept(n, true));  // is number 0, and computed first: the others begin like it
    Gains gains = o.method == "shapley" ? shapley(n, o.samples, f.sampling.seed, variants)
                                        : leave_one_out(n, variants);
    vector<Question> questions;
    for (const Kept& kept : variants.all) {
        string text = variant(pieces, kept);
        questions.push_back({format ? tokenizer.encode(format->render({{"user", text}}))
                                    : tokenizer.encode(text, !f.no_special), {}});
        if (questions.back().prompt.empty())
            fail("prompt: a variant has nothing left of it; use --chat, or --by segment");
    }
    vector<int> ids = tokenizer.encode(o.answer);
    if (ids.empty()) {
        Request r = s.request(questions[0].prompt);
        r.sampling = {};
        ids = ::run(s, r, false)[0].ids;
        std::erase_if(ids, [&](int id) { return s.model.config.eos.count(id) > 0; });
        if (ids.empty() && !interrupted) fail("the model answers nothing; give --answer");
    }
    for (Question& q : questions) q.answer = ids;
    string answer = tokenizer.decode(ids);
    Scores scores;
    if (o.separate) start = now();
    for (const Question& q : questions) {  // each loads the model and shares nothing
        if (!o.separate || interrupted) break;
        Session alone(f);
        Scores one = score_answers(alone.engine, {q});
        scores.logprobs.push_back(one.logprobs[0]);
        scores.tokens += one.tokens;
    }
    if (!o.separate) scores = score_answers(s.engine, questions);
    if (interrupted) return;
    double seconds = now() - start;
    set_values(pieces, gains, scores.logprobs);
    ordered j = {{"answer", answer}, {"logprob", scores.logprobs[0]}};
    for (const Piece& p : pieces) {
        if (p.fixed) continue;
        ordered entry = {{"value", p.value}, {"error", p.error}, {"text", p.text}};
        string text = p.text, error = o.method == "shapley" ? " ± " + number(p.error) : "";
        j["segments"].push_back(entry);
        std::ranges::replace_if(text, [](unsigned char c) { return c < 32; }, ' ');
        if (!f.json) put(str(std::setw(8), number(p.value), error, "  ", text, "\n"));
    }
    j.update({{"variants", questions.size()}, {"tokens", scores.tokens},
              {"cached", scores.cached}, {"seconds", seconds}});
    if (f.json) put(j.dump() + "\n");
    fprintf(stderr, "\nanswer %s, log-probability %.2f; %zu variants, %ld tokens (%ld from cache), "
            "%.2f s\n", json(answer).dump().c_str(), scores.logprobs[0], questions.size(),
            long(scores.tokens), long(scores.cached), seconds);
    if (!o.page.empty())
        WholeFile(o.page).finish(page(o, pieces, answer, scores.logprobs[0]));
}

void add_flags(CommandLine& line) {
    line.f.max_tokens = 32;
    line.f.sampling.seed = 0;
    line.text_flags();
    line.flag("--chat", options.chat, "the text is a question in the model's chat format");
    line.flag("--no-special", line.f.no_special, "add no bos in front of the text");
    line.flag("--answer TEXT", options.answer,
              "to explain; else the model's own, by greedy search");
    line.flag("-n,--max-tokens N", line.f.max_tokens, "of its own answer; else 32", kSize);
    line.group("how it is attributed");
    line.flag("--by UNIT", options.by, "word, sentence (the default), or segment: marked [[so]]",
              CLI::IsMember({"word", "sentence", "segment"}));
    line.flag("--method NAME", options.method, "leave-one-out (the default) or shapley",
              CLI::IsMember({"leave-one-out", "shapley"}));
    line.flag("--samples N", options.samples, "orders drawn for shapley; else 20", kSize);
    line.flag("--seed N", line.f.sampling.seed, "of these draws; else 0");
    line.flag("-o,--output FILE", options.page, "an HTML page with the prompt as a heat map");
    line.flag("--separate", options.separate, "for comparison: load and run for each variant");
    line.flag("--json", line.f.json, "one JSON object");
    line.engine_flags();
}

const bool kAdded = add_command({"attribute",
    "which parts of a prompt caused its answer", add_flags, run});

}  // namespace attribute
