// The tokenizer and the chat formats against Hugging Face's own results.
#include "common.hpp"

namespace {

const Tokenizer& tokenizer(const std::string& name) {
    static std::map<std::string, Tokenizer> all;
    return all.try_emplace(name, name == "smollm2" ? kDemo : "build/tokenizers/" + name).first->second;
}

}  // namespace

TEST_CASE("every golden text encodes and decodes as in Hugging Face") {
    for (std::string name : {"smollm2", "qwen3"}) {
        std::istringstream lines(read_file(kData + "tokenizer/" + name + ".jsonl"));
        int count = 0;
        for (std::string line; std::getline(lines, line); count++) {
            json one = json::parse(line);
            std::vector<int> ids = one["ids"];
            CAPTURE(line);
            CHECK(tokenizer(name).encode(one["text"].get<std::string>()) == ids);
            CHECK(tokenizer(name).decode(ids) == one["decoded"].get<std::string>());
        }
        CHECK(count == 231);
    }
}

TEST_CASE("every golden rendering of a chat is the template's") {
    for (std::string name : {"smollm2", "qwen3", "llama3"}) {
        json g = golden("chat/" + name + ".json");
        Chat chat(g["template"], g["bos_token"].is_null() ? "" : g["bos_token"]);
        for (const json& one : g["renderings"]) {
            std::vector<Message> messages;
            for (const json& m : one["messages"]) messages.push_back({m["role"], m["content"]});
            chat.thinking = one["options"].value("enable_thinking", true);
            CHECK(chat.render(messages) == one["text"].get<std::string>());
        }
    }
}
