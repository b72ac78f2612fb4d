// Text in and out: UTF-8, text that grows id by id, the tokenizer's speed, and the chat formats that
// no golden rendering covers.
#include "common.hpp"

namespace {

#ifdef __SANITIZE_ADDRESS__
const bool kTimed = false;  // the sanitizers' own work would be measured
#else
const bool kTimed = true;
#endif

const std::vector<std::string> kTokenizers = {kDemo, "build/tokenizers/qwen3"};
const std::string kBad = "\uFFFD";

const Tokenizer& loaded(const std::string& folder) {
    static std::map<std::string, Tokenizer> all;
    return all.try_emplace(folder, folder).first->second;
}

// What TextStream gives for bytes that come in these pieces.
std::string streamed(const std::vector<std::string>& pieces) {
    std::string bytes, text;
    for (const std::string& piece : pieces) {
        bytes += piece;
        utf8_take(bytes, text, false);
    }
    utf8_take(bytes, text, true);
    return text;
}

std::string character(uint32_t code) {
    utf8proc_uint8_t out[4];
    return {(char*)out, size_t(utf8proc_encode_char(int(code), out))};
}

// Characters that all tokenizers know: no control characters, nothing past U+3FFFF.
std::string random_text(std::mt19937& random, int length) {
    static const std::vector<std::pair<uint32_t, uint32_t>> ranges = {
        {' ', '~'}, {' ', '~'}, {0xA0, 0x24F}, {0x300, 0x36F}, {0x400, 0x4FF}, {0x600, 0x6FF}, {0x900, 0x97F},
        {0x2000, 0x206F}, {0x3040, 0x30FF}, {0x4E00, 0x9FFF}, {0xAC00, 0xD7A3}, {0x1F300, 0x1F6FF}, {0x20000, 0x2A6DF}};
    std::string text;
    for (int i = 0; i < length; i++) {
        auto [first, last] = ranges[random() % ranges.size()];
        text += random() % 8 ? character(first + random() % (last - first + 1)) : std::string(random() % 4, " \n\t1"[random() % 4]);
    }
    return text;
}

// What may be shown of a text that goes on: nothing from a stop string on, nor what may begin one.
std::string certain(const std::string& text, const std::vector<std::string>& stops) {
    size_t end = text.size();
    for (const std::string& stop : stops) end = std::min(end, text.find(stop));
    if (end < text.size()) return text.substr(0, end);
    for (size_t begin = text.size(); begin-- > 0;)
        for (const std::string& stop : stops)
            if (stop.starts_with(text.substr(begin))) end = begin;
    return text.substr(0, end);
}

// Of this thread, so that nothing counts that runs beside it.
double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// The parts of Llama 3.1's and 3.2's templates that decide what is written.
std::string llama_template(const std::string& date) {
    return R"({{- bos_token }}
{%- if not date_string is defined %}
    )" + date + R"(
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
)";
}

const std::string kFixedDate = R"({%- set date_string = "26 Jul 2024" %})";
const std::string kDateOfToday = R"({%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %})";

const std::string kQwen25 = R"({%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)";

}  // namespace

TEST_CASE("utf8_char measures whole characters, and says how much one U+FFFD stands for") {
    struct Case {
        std::string bytes;
        int length;
    };
    for (const Case& c : std::vector<Case>{
             {"a", 1},           {"\x7F", 1},             {"\xC2\x80", 2},         {"\xDF\xBF!", 2},
             {"\xE0\xA0\x80", 3}, {"\xEF\xBF\xBF", 3},     {"\xF0\x90\x80\x80", 4}, {"\xF4\x8F\xBF\xBF", 4},
             {"\xC2", 0},        {"\xE2\x82", 0},         {"\xF0\x9F\x98", 0},     {"\xE2", 0},
             {"\x80", -1},       {"\xC0\x80", -1},        {"\xC1\xBF", -1},        {"\xF5\x80\x80\x80", -1},
             {"\xFF", -1},       {"\xC2!", -1},           {"\xE0\x9F\xBF", -1},    {"\xED\xA0\x80", -1},
             {"\xF0\x8F\xBF\xBF", -1}, {"\xF4\x90\x80\x80", -1}, {"\xE2\x82!", -2},  {"\xF0\x9F\x98!", -3}}) {
        CAPTURE(json(c.bytes).dump(-1, ' ', true, json::error_handler_t::replace));
        CHECK(utf8_char(c.bytes) == c.length);
    }
    for (uint32_t code = 0; code < 0x110000; code++) {
        if (code >= 0xD800 && code < 0xE000) continue;
        std::string s = character(code);
        REQUIRE(utf8_char(s) == int(s.size()));
    }
}

TEST_CASE("bytes that are no UTF-8 become U+FFFD as the Unicode standard's tables have it") {
    struct Case {
        std::string bytes, text;
    };
    auto bad = [](int count) {
        std::string text;
        for (int i = 0; i < count; i++) text += kBad;
        return text;
    };
    for (const Case& c : std::vector<Case>{
             {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82" "A", bad(8) + "A"},                              // table 3-8
             {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF" "A", bad(8) + "A"},                              // table 3-9
             {"\xF4\x91\x92\x93\xFF" "A\x80\xBF" "B", bad(5) + "A" + bad(2) + "B"},               // table 3-10
             {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF" "A", bad(4) + "A"},                              // table 3-11
             {"\xF0\x80\x80" "A", bad(3) + "A"},
             {"a\xE2\x82\xAC" "b\xE2\x82", "a\u20AC" "b" + bad(1)},
             {"\xF0\x9F\x98\x80\xF0\x9F\x98", "\U0001F600" + bad(1)},
             {std::string("\0\xC2", 2), std::string(1, '\0') + bad(1)},
             {"", ""}}) {
        CHECK(streamed({c.bytes}) == c.text);
        std::vector<std::string> single;  // the same however it is cut
        for (char byte : c.bytes) single.push_back(std::string(1, byte));
        CHECK(streamed(single) == c.text);
        for (size_t i = 0; i <= c.bytes.size(); i++)
            CHECK(streamed({c.bytes.substr(0, i), c.bytes.substr(i)}) == c.text);
    }
}

TEST_CASE("utf8_take gives a character when its last byte comes, a bad one as soon as it is certain") {
    std::string bytes, text;
    auto push = [&](const std::string& more) {
        bytes += more;
        text.clear();
        utf8_take(bytes, text, false);
        return text;
    };
    CHECK(push("\xE2") == "");
    CHECK(push("\x82") == "");
    CHECK(push("\xAC" "a\xF0\x9F") == "\u20AC" "a");
    CHECK(push("\x98") == "");
    CHECK(push("b") == kBad + "b");
    CHECK(push("\xF0\x9F") == "");
    CHECK(push("\xF0") == kBad);
    CHECK(push("\x9F\x98\x80") == "\U0001F600");
    CHECK(bytes == "");
}

TEST_CASE("invalid UTF-8 in a prompt is refused with its byte offset") {
    struct Case {
        std::string text;
        int offset;
    };
    for (const std::string& folder : kTokenizers)
        for (const Case& c : std::vector<Case>{{"\xFF", 0},
                                               {"abc\xC3", 3},
                                               {"\u20AC\xE2\x82" "a", 3},
                                               {"a\xED\xA0\x80", 1},
                                               {"<|im_end|>\x80", 10},
                                               {std::string(1000, 'x') + "\xC0\x80", 1000}}) {
            std::string error = error_of([&] { loaded(folder).encode(c.text); });
            CAPTURE(error);
            CHECK(error.find(str("byte ", c.offset)) != std::string::npos);
            CHECK(error.find('\n') == std::string::npos);
        }
}

TEST_CASE("random text survives encode and decode, and comes out whole id by id") {
    std::mt19937 random(1);
    for (const std::string& folder : kTokenizers) {
        const Tokenizer& t = loaded(folder);
        bool normalizes = folder != kDemo;
        int split = 0;  // characters that came in pieces
        for (int i = 0; i < 300; i++) {
            std::string text = random_text(random, 60);
            std::vector<int> ids = t.encode(text);
            if (normalizes) {
                auto* nfc = utf8proc_NFC((const utf8proc_uint8_t*)text.c_str());
                text = (const char*)nfc;
                free(nfc);
            }
            CAPTURE(text);
            CHECK(t.decode(ids) == text);
            TextStream stream(&t, {});
            std::string shown;
            for (int id : ids) {
                std::string more = stream.push(id);
                for (size_t at = 0; at < more.size(); at += utf8_char(more.substr(at)))
                    REQUIRE(utf8_char(more.substr(at)) > 0);
                split += more.empty();
                shown += more;
            }
            CHECK(shown + stream.finish() == text);
        }
        CHECK(split > 100);
    }
}

TEST_CASE("a text stops before the first stop string, and shows nothing that may begin one") {
    const Tokenizer& t = loaded(kDemo);
    std::mt19937 random(2);
    auto letters = [&](int least, int most) {
        std::string text;
        for (int n = least + int(random() % (most - least + 1)); n > 0; n--) text += "ab\u20AC"[random() % 2];
        return text;
    };
    int stopped = 0;
    for (int i = 0; i < 3000; i++) {
        std::vector<std::string> stops;
        for (int n = 1 + random() % 3; n > 0; n--) stops.push_back(letters(1, 6));
        TextStream stream(&t, stops);
        std::string text, shown;
        for (int pushes = 0; pushes < 20 && !stream.stopped; pushes++) {
            std::string piece = letters(1, 3);  // one id if the vocabulary has it, else more
            for (int id : t.encode(piece)) {
                if (stream.stopped) break;
                text += t.bytes(id);
                shown += stream.push(id);
                REQUIRE(shown == certain(text, stops));
            }
        }
        size_t first = std::string::npos;
        for (const std::string& stop : stops) first = std::min(first, text.find(stop));
        CHECK(stream.stopped == (first != std::string::npos));
        stopped += stream.stopped;
        CHECK(shown + stream.finish() == text.substr(0, first));
        if (stream.stopped) CHECK(stream.push(t.encode("a")[0]) == "");
    }
    CHECK(stopped > 1000);
    CHECK(stopped < 2990);
}

TEST_CASE("stop strings: across ids, with half characters, the first in the text counts, at the end") {
    const Tokenizer& t = loaded(kDemo);
    auto shown = [&](const std::string& text, const std::vector<std::string>& stops) {
        TextStream stream(&t, stops);
        std::string out;
        for (int id : t.encode(text)) out += stream.push(id);
        return out + stream.finish();
    };
    CHECK(shown("The capital of France is Paris. And", {"Paris."}) == "The capital of France is ");
    CHECK(shown("one two three", {"e t", "two"}) == "on");
    CHECK(shown("one two three", {"three", "two three"}) == "one ");
    CHECK(shown("one two", {"twofold"}) == "one two");
    CHECK(shown("aab", {"aab"}) == "");
    CHECK(shown("aaab", {"aab"}) == "a");
    CHECK(shown("x\U0001F600y", {"\U0001F600"}) == "x");
    CHECK(shown("x\U0001F600y", {"\U0001F601"}) == "x\U0001F600y");
    CHECK(shown("a<|im_end|>b", {"ab"}) == "");  // special ids have no text
    CHECK(shown("a<|im_end|>b", {}) == "ab");
    TextStream none(nullptr, {"a"});
    CHECK(none.push(5) + none.finish() == "");
}

TEST_CASE("special ids and ids outside the vocabulary have no text") {
    const Tokenizer& t = loaded(kDemo);
    const int special = 1;  // <|im_start|>
    CHECK(t.encode("<|im_start|>") == std::vector{special});
    TextStream stream(&t, {});
    for (int id : {special, 49152, -1, INT_MAX}) CHECK(stream.push(id) == "");
    CHECK(stream.push(t.encode("a")[0]) == "a");
    std::vector<int> both = {special, t.encode("a")[0]};
    CHECK(t.decode(both) == "<|im_start|>a");  // decode is asked for all of them
}

TEST_CASE("the tokenizer encodes 1 MB of English in 0.5 s, and no text takes it longer than that by much") {
    std::string page = read_file(kData + "smollm2/perplexity.txt"), english;
    for (int i = 0; english.size() < 1'000'000; i++) {
        page[size_t(i) * 37 % page.size()] = char('a' + i % 26);  // no two pages are the same
        english += page;
    }
    std::string marks;  // combining marks that the normal form must sort
    for (int i = 0; marks.size() < 1'000'000; i++) marks += i % 100 ? "\u0301\u0316" : "a";
    struct Case {
        std::string name, text;
        double most;
    };
    const std::vector<Case> cases = {{"English", english.substr(0, 1'000'000), 0.5},
                                     {"letters", std::string(100'000, 'a'), 1},
                                     {"spaces", std::string(1'000'000, ' '), 1},
                                     {"lines", std::string(1'000'000, '\n'), 1},
                                     {"digits", std::string(1'000'000, '7'), 1},
                                     {"marks", marks, 1}};
    for (const std::string& folder : kTokenizers) {
        const Tokenizer& t = loaded(folder);
        t.encode("warm");
        for (const Case& c : cases) {
            double start = cpu_seconds();
            std::vector<int> ids = t.encode(c.text);
            double seconds = cpu_seconds() - start;
            CAPTURE(folder);
            CAPTURE(c.name);
            if (kTimed) CHECK(seconds < c.most);
            if (c.name != "marks") CHECK(t.decode(ids) == c.text);
        }
    }
    std::string many = "a";  // in one run, sorting would take the square of their number
    for (int i = 0; i < 200; i++) many += "\u0301\u0316";
    std::string error = error_of([&] { loaded("build/tokenizers/qwen3").encode(many); });
    CHECK(error.find("combining marks") != std::string::npos);
}

TEST_CASE("a chat template that is not known is refused, and generate named") {
    for (std::string text : {
             "", "plain", "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}",
             "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
             "{{ '<|user|>\n' + message['content'] + eos_token }}"}) {
        TempFolder folder;
        folder.write("tokenizer_config.json", json{{"chat_template", text}, {"bos_token", "<s>"}}.dump());
        std::string error = error_of([&] { Chat::load(folder.path); });
        CAPTURE(error);
        CHECK(error.find("generate") != std::string::npos);
        CHECK(error.find('\n') == std::string::npos);
    }
}

TEST_CASE("a chat template is found in its own file, in tokenizer_config.json, or in a list there") {
    const std::string expected = Chat(kQwen25, "").render({{"user", "hi"}});
    const json named = {{{"name", "tool_use"}, {"template", "x"}}, {{"name", "default"}, {"template", kQwen25}}};
    for (const json& value : {json(kQwen25), named}) {
        TempFolder folder;
        folder.write("tokenizer_config.json", json{{"chat_template", value}, {"bos_token", nullptr}}.dump());
        CHECK(Chat::load(folder.path).render({{"user", "hi"}}) == expected);
    }
    TempFolder folder;
    folder.write("chat_template.jinja", kQwen25);
    CHECK(Chat::load(folder.path).render({{"user", "hi"}}) == expected);
    folder.write("tokenizer_config.json", json{{"chat_template", "another"}}.dump());
    CHECK(Chat::load(folder.path).render({{"user", "hi"}}) == expected);  // as in transformers
}

TEST_CASE("Llama 3.1 and 3.2 put the date lines into the system message") {
    char today[32];
    time_t seconds = time(nullptr);
    strftime(today, sizeof today, "%d %b %Y", localtime(&seconds));
    struct Case {
        std::string set_date, date;
    };
    for (const Case& c : std::vector<Case>{{kFixedDate, "26 Jul 2024"}, {kDateOfToday, today}}) {
        Chat chat(llama_template(c.set_date), "<|begin_of_text|>");
        const std::string begin = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: " + c.date + "\n\n";
        const std::string user = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
                          assistant = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
        CHECK(chat.render({{"user", "Hi"}}) == begin + user + "Hi" + assistant);
        CHECK(chat.render({{"system", " Be brief.\n"}, {"user", "\tHi "}}) ==
              begin + "Be brief." + user + "Hi" + assistant);
        CHECK(chat.render({{"user", "A"}, {"assistant", "\nB\n\n"}, {"user", "C"}}) ==
              begin + user + "A" + assistant + "B" + user + "C" + assistant);
        chat.date = "01 Jan 2030";
        CHECK(chat.render({{"user", "Hi"}}).find("Today Date: 01 Jan 2030\n\n<|eot_id|>") != std::string::npos);
    }
}

TEST_CASE("Qwen2.5's default system text comes out of its template") {
    Chat chat(kQwen25, "");
    CHECK(chat.render({{"user", "Hi"}}) ==
          "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
          "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    CHECK(chat.render({{"system", ""}, {"user", " Hi "}}) ==
          "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
}

TEST_CASE("a chat needs a user's message last, and roles that it knows") {
    Chat chat(kQwen25, "");
    for (const std::vector<Message>& messages : std::vector<std::vector<Message>>{
             {}, {{"system", "x"}}, {{"user", "x"}, {"assistant", "y"}}, {{"tool", "x"}, {"user", "y"}}}) {
        std::string error = error_of([&] { chat.render(messages); });
        CHECK(error.find("chat: ") == 0);
        CHECK(error.find('\n') == std::string::npos);
    }
}

TEST_CASE("a conversation's ids, turn by turn, are those of the whole rendering") {
    struct Case {
        std::string name;
        const Tokenizer& tokenizer;
        Chat chat;
    };
    // the demo's vocabulary with Llama's splits and special tokens
    json j = json::parse(read_file(kDemo + "/tokenizer.json"));
    j["pre_tokenizer"]["pretokenizers"] = json::parse(R"([
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}])");
    int next = 49152;
    for (const char* token : {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})
        j["added_tokens"].push_back({{"id", next++}, {"content", token}, {"special", true}});
    TempFolder folder;
    folder.write("tokenizer.json", j.dump());
    const Tokenizer llama(folder.path), &smollm2 = loaded(kTokenizers[0]), &qwen = loaded(kTokenizers[1]);
    auto golden_chat = [](const std::string& name) {
        json g = golden("chat/" + name + ".json");
        return Chat(g["template"], g["bos_token"].is_null() ? "" : g["bos_token"]);
    };
    const std::vector<std::pair<std::string, std::string>> talk = {
        {"Hello!", "Hi there."}, {"  two\n\nlines ", "1. one\n2. two"}, {"\u00E9\U0001F600?", "\u00E9!"}, {"x", ""}, {"bye", "Bye"}};
    for (const Case& c : std::vector<Case>{{"smollm2", smollm2, golden_chat("smollm2")},
                                           {"qwen2.5", qwen, Chat(kQwen25, "")},
                                           {"qwen3", qwen, golden_chat("qwen3")},
                                           {"llama3", llama, golden_chat("llama3")},
                                           {"llama3.1", llama, Chat(llama_template(kFixedDate), "<|begin_of_text|>")}})
        for (bool with_system : {false, true}) {
            CAPTURE(c.name);
            const Tokenizer& t = c.tokenizer;
            const std::string system = "Be kind.";
            std::vector<Message> messages;
            if (with_system) messages.push_back({"system", system});
            std::vector<int> ids = t.encode(c.chat.opening(with_system ? &system : nullptr));
            for (const auto& [question, answer] : talk) {
                messages.push_back({"user", question});
                for (int id : t.encode(c.chat.user_turn(question))) ids.push_back(id);
                CHECK(ids == t.encode(c.chat.render(messages)));
                messages.push_back({"assistant", answer});
                for (int id : t.encode(answer)) ids.push_back(id);
                for (int id : t.encode(c.chat.end_of_turn)) ids.push_back(id);
            }
        }
}
