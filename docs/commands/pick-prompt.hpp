// pick-prompt: which of some prompt templates makes a model say the right thing. A template is
// filled with each example's text and followed by each of the labels; what counts is how likely the
// model finds them. Ranked by the mean log-probability of the right one, which also tells templates
// apart that get the same examples right.
//
// All of it is one batch: a template's beginning is computed once for all examples, and an example
// once for all labels, in whole blocks of the cache.
#pragma once

#include "answers.hpp"
#include "objects.hpp"

namespace pick_prompt {

struct Options {
    string templates, examples;  // files
    vector<string> labels;
    bool chat = false;
} options;

struct Example {
    string text;
    int label;  // of the labels, the right one
};

struct Template {
    string text;  // up to the label
    double accuracy = 0, mean = 0, error = 0;  // of the right label's log-probability
};

// Calls take(line) with each line of a file that is not empty; an error gets the line's number.
void each_line(const string& path, auto take) {
    std::istringstream file(read_file(path));
    int64_t number = 0;
    for (string line; std::getline(file, line);) {
        number++;
        if (line.ends_with('\r')) line.pop_back();
        try {
            if (!line.empty()) take(line);
        } catch (const json::exception&) {
            fail(path, ": line ", number, ": not the JSON that is expected; see README");
        } catch (const std::exception& e) {
            fail(path, ": line ", number, ": ", e.what());
        }
    }
    if (!number) fail(path, ": is empty");
}

vector<Template> read_templates(const string& path) {
    vector<Template> templates;
    each_line(path, [&](const string& line) {
        string text = line[0] == '"' ? parse_json(line).get<string>() : line;
        size_t label = text.find("{label}");
        if (text.find("{text}") > label || label + 7 != text.size())
            fail("expected {text}, and then {label} at its end");
        templates.push_back({text.substr(0, label)});
    });
    return templates;
}

// labels: those that are known; if there are none, all that come are taken.
vector<Example> read_examples(const string& path, vector<string>& labels) {
    vector<Example> examples;
    const bool open = labels.empty();
    each_line(path, [&](const string& line) {
        json j = parse_json(line);
        string text = j.at("text"), label = j.at("label");
        auto found = std::ranges::find(labels, label);
        if (label.empty() || (found == labels.end() && !open))
            fail("label ", json(label).dump(), " is not among those of --label");
        examples.push_back({text, int(found - labels.begin())});
        if (found == labels.end()) labels.push_back(label);
    });
    if (labels.size() < 2) fail(path, ": only one label in it; give others with --label");
    return examples;
}

// The white space in front of a label goes with the label, as it does in the ids of a text.
Question question(const Session& s, const std::optional<Chat>& format, const Template& t,
                  const string& text, string label) {
    string prompt = t.text;
    size_t end = prompt.find_last_not_of(" \n") + 1;
    if (!format) label = prompt.substr(end) + label;
    prompt.resize(end);
    for (size_t at = 0; (at = prompt.find("{text}", at)) != string::npos; at += text.size())
        prompt.replace(at, 6, text);
    if (format) prompt = format->render({{"user", prompt}});
    bool special = !format && !s.f.no_special;
    Question q = {s.tokenizer->encode(prompt, special), s.tokenizer->encode(label)};
    if (q.prompt.empty()) fail("an example without text gives an empty prompt");
    return q;
}

void run(const Flags& f) {
    vector<string> labels = options.labels;
    vector<Template> templates = read_templates(options.templates);
    vector<Example> examples = read_examples(options.examples, labels);
    std::optional<Chat> format;
    if (options.chat) format = Chat::load(f.model);
    Session s(f, true);
    vector<Question> questions;  // labels last: an example's others find it computed by then
    for (const string& label : labels)
        for (const Template& t : templates)
            for (const Example& e : examples)
                questions.push_back(question(s, format, t, e.text, label));
    double start = now();
    Scores scores = score_answers(s.engine, questions);
    if (interrupted) return;
    size_t n = examples.size();
    for (size_t t = 0; t < templates.size(); t++) {
        auto logprob = [&](size_t label, size_t example) {
            return scores.logprobs[(label * templates.size() + t) * n + example];
        };
        double sum = 0, squares = 0;
        for (size_t e = 0; e < n; e++) {
            double right = logprob(examples[e].label, e), best = -INFINITY;
            for (size_t l = 0; l < labels.size(); l++)
                if (int(l) != examples[e].label) best = std::max(best, logprob(l, e));
            templates[t].accuracy += (right > best) / double(n);
            sum += right, squares += right * right;
        }
        templates[t].mean = sum / double(n);
        double variance = (squares - sum * sum / double(n)) / double(n - 1);
        templates[t].error = n > 1 ? std::sqrt(std::max(0.0, variance) / double(n)) : 0;
    }
    std::ranges::stable_sort(templates, std::greater<>{}, &Template::mean);
    if (!f.json) put("accuracy  log-probability  template\n");
    for (const Template& t : templates) {
        if (f.json) put_object({{"template", t.text + "{label}"}, {"accuracy", t.accuracy},
                                {"logprob", t.mean}, {"error", t.error}}, true);
        else put(str(std::fixed, std::setprecision(3), std::setw(8), t.accuracy, std::setw(10),
                     t.mean, " ± ", t.error, "  ", json(t.text + "{label}").dump(), "\n"));
    }
    fprintf(stderr, "\n%zu templates, %zu examples, %zu labels: %ld tokens (%ld from cache), "
            "%.2f s\n", templates.size(), n, labels.size(), long(scores.tokens),
            long(scores.cached), now() - start);
}

void add_flags(CommandLine& line) {
    line.argument("TEMPLATES", options.templates, "a file, a template a line, with {text} and, at "
        "its end, {label}; a JSON string if it has several lines");
    line.argument("EXAMPLES", options.examples, "JSONL: {\"text\": ..., \"label\": ...}");
    line.flag("--label TEXT", options.labels, "one of the labels; repeated; else all in EXAMPLES");
    line.flag("--chat", options.chat, "a template is a question, the label the answer");
    line.flag("--no-special", line.f.no_special, "add no bos in front of a prompt");
    line.flag("--json", line.f.json, "one JSON object a template");
    line.engine_flags();
}

const bool kAdded = add_command({"pick-prompt",
    "which prompt template makes a model say the right label", add_flags, run});

}  // namespace pick_prompt
