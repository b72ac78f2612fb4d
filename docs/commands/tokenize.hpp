// tokenize: text to ids and back, and a conversation to the ids that a model gets.
#pragma once

#include "objects.hpp"

namespace tokenize {

struct Options {
    bool jsonl = false, decode = false, chat = false;
} options;

void run(const Flags& f) {
    Tokenizer tokenizer(f.model);
    const Options& o = options;
    auto convert = [&](const json& j) -> json {
        if (o.decode) return tokenizer.decode(ids_of(j, "--decode"));
        if (!o.chat) return tokenizer.encode(j.get<string>(), !f.no_special);
        Chat format = Chat::load(f.model);
        format.thinking = !f.no_think;
        vector<Message> messages;
        for (const json& m : j) messages.push_back({m.at("role"), m.at("content")});
        return tokenizer.encode(format.render(messages));
    };
    string text = input_text(f), out;
    std::istringstream lines(text);
    for (string line; o.jsonl && std::getline(lines, line);)
        out += convert(parse_json(line)).dump() + "\n";
    if (o.jsonl) return put(out);
    json j = convert(o.decode || o.chat ? parse_json(text) : json(text));
    put(o.decode ? j.get<string>() : j.dump() + "\n");
}

void add_flags(CommandLine& line) {
    line.flag("--jsonl", options.jsonl, "a JSON string a line in, an array of ids out");
    line.flag("--decode", options.decode, "ids to text");
    line.flag("--chat", options.chat, "in: a JSON array of messages");
    line.flag("--no-think", line.f.no_think, "Qwen3: answer without a thought");
    line.flag("--no-special", line.f.no_special, "add no bos, or what else the tokenizer adds");
    json_flag(line);
    line.text_flags();
}

const bool kAdded = add_command({"tokenize", "text to ids", add_flags, run});

}  // namespace tokenize
