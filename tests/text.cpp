// Text in and out: UTF-8, text that grows id by id, the tokenizer's speed, and the chat formats
// that no golden rendering covers.
#include "common.hpp"

namespace {

const vector<string> kTokenizers = {kDemo, "build/tokenizers/qwen3"};
const string kBad = "\uFFFD";

const Tokenizer& loaded(const string& folder) {
    static std::map<string, Tokenizer> all;
    return all.try_emplace(folder, folder).first->second;
}

// What comes of bytes that arrive in these pieces.
string taken(const vector<string>& pieces) {
    string bytes, text;
    for (const string& piece : pieces) {
        bytes += piece;
        utf8_take(bytes, text, false);
    }
    utf8_take(bytes, text, true);
    return text;
}

string repeated(const string& text, int count) {
    string out;
    for (int i = 0; i < count; i++) out += text;
    return out;
}

string character(uint32_t code) {
    utf8proc_uint8_t out[4];
    return {(char*)out, size_t(utf8proc_encode_char(int(code), out))};
}

// Characters that both tokenizers have bytes for: no control characters, nothing past U+3FFFF.
string random_text(std::mt19937& random, int length) {
    static const vector<std::pair<uint32_t, uint32_t>> ranges = {
        {' ', '~'},       {' ', '~'},       {0xA0, 0x24F},    {0x300, 0x36F},     {0x400, 0x4FF},
        {0x600, 0x6FF},   {0x900, 0x97F},   {0x2000, 0x206F}, {0x3040, 0x30FF},   {0x4E00, 0x9FFF},
        {0xAC00, 0xD7A3}, {0x1F300, 0x1F6FF}, {0x20000, 0x2A6DF}};
    string text;
    for (int i = 0; i < length; i++) {
        auto [first, last] = ranges[random() % ranges.size()];
        if (random() % 8) text += character(first + random() % (last - first + 1));
        else text += string(random() % 4, " \n\t1"[random() % 4]);
    }
    return text;
}

string normal_form(const string& text) {
    auto* form = utf8proc_NFC((const utf8proc_uint8_t*)text.c_str());
    string out = (const char*)form;
    free(form);
    return out;
}

// What may be shown of a text that goes on: nothing from a stop string on, nor what may begin one.
string certain(const string& text, const vector<string>& stops) {
    size_t end = text.size();
    for (const string& stop : stops) end = std::min(end, text.find(stop));
    if (end < text.size()) return text.substr(0, end);
    for (size_t begin = text.size(); begin-- > 0;)
        for (const string& stop : stops)
            if (stop.starts_with(text.substr(begin))) end = begin;
    return text.substr(0, end);
}

// Of this thread, so that nothing counts that runs beside it.
double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// What decides over a rendering in the templates of Llama 3.1 and 3.2.
string llama_template(const string& set_date) {
    return "{{- bos_token }}{%- if not date_string is defined %}" + set_date + R"({%- endif %}
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
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n')"
           R"(+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
)";
}

const string kFixedDate = R"({%- set date_string = "26 Jul 2024" %})";
const string kDateOfToday = R"({%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %})";

const string kQwenSystem = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
const string kQwen25 = R"({%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\n)" + kQwenSystem + R"(<|im_end|>\n' }}
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
        int length;
        vector<string> bytes;
    };
    const vector<Case> cases = {
        {1, {"a", "\x7F"}},
        {2, {"\xC2\x80", "\xDF\xBF!"}},
        {3, {"\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF"}},
        {4, {"\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}},
        {0, {"\xC2", "\xE2", "\xE2\x82", "\xF0", "\xF0\x9F", "\xF0\x9F\x98"}},
        {-1, {"\x80", "\xBF!", "\xC0\x80", "\xC1\xBF", "\xF5\x80\x80\x80", "\xFF", "\xC2!"}},
        {-1, {"\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xE2!"}},
        {-2, {"\xE2\x82!", "\xF0\x9F\xF0", "\xE2\x82\xE2\x82"}},
        {-3, {"\xF0\x9F\x98!", "\xF4\x8F\xBF\xC0"}}};
    for (const Case& c : cases)
        for (const string& bytes : c.bytes) {
            CAPTURE(c.length);
            CHECK(utf8_char(bytes) == c.length);
        }
    int wrong = 0;
    for (uint32_t code = 0; code < 0x110000; code++) {
        if (code == 0xD800) code = 0xE000;  // surrogates are no characters
        string s = character(code);
        wrong += utf8_char(s) != int(s.size());
    }
    CHECK(wrong == 0);
}

TEST_CASE("bytes that are no UTF-8 become U+FFFD as the Unicode standard's tables have it") {
    const vector<std::pair<string, string>> cases = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82" "A", repeated(kBad, 8) + "A"},   // table 3-8
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF" "A", repeated(kBad, 8) + "A"},   // table 3-9
        {"\xF4\x91\x92\x93\xFF" "A\x80\xBF" "B", repeated(kBad, 5) + "A" + kBad + kBad + "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF" "A", repeated(kBad, 4) + "A"},   // table 3-11
        {"\xF0\x80\x80" "A", repeated(kBad, 3) + "A"},
        {"a\xE2\x82\xAC" "b\xE2\x82", "a\u20AC" "b" + kBad},
        {"\xF0\x9F\x98\x80\xF0\x9F\x98", "\U0001F600" + kBad},
        {string("\0\xC2", 2), string(1, '\0') + kBad},
        {"", ""}};
    for (const auto& [bytes, text] : cases) {
        CHECK(taken({bytes}) == text);
        vector<string> single;  // the same wherever it is cut
        for (char byte : bytes) single.push_back(string(1, byte));
        CHECK(taken(single) == text);
        for (size_t i = 0; i <= bytes.size(); i++)
            CHECK(taken({bytes.substr(0, i), bytes.substr(i)}) == text);
    }
}

TEST_CASE("a character is given out with its last byte, a bad one as soon as it is certain") {
    string bytes;
    auto push = [&](const string& more) {
        string text;
        bytes += more;
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
    const vector<std::pair<string, int>> cases = {{"\xFF", 0},
                                                  {"abc\xC3", 3},
                                                  {"\u20AC\xE2\x82" "a", 3},
                                                  {"a\xED\xA0\x80", 1},
                                                  {"<|im_end|>\x80", 10},
                                                  {string(1000, 'x') + "\xC0\x80", 1000}};
    for (const string& folder : kTokenizers)
        for (const auto& [text, offset] : cases) {
            string error = error_of([&] { loaded(folder).encode(text); });
            CAPTURE(error);
            CHECK(error.find(str("byte ", offset)) != string::npos);
            CHECK(error.find('\n') == string::npos);
        }
}

TEST_CASE("random text survives encode and decode, and comes out whole id by id") {
    std::mt19937 random(1);
    for (const string& folder : kTokenizers) {
        const Tokenizer& t = loaded(folder);
        int halves = 0;  // ids that end inside a character
        for (int i = 0; i < 300; i++) {
            string text = random_text(random, 60), shown;
            vector<int> ids = t.encode(text);
            if (folder != kDemo) text = normal_form(text);  // Qwen's has a normalizer
            CAPTURE(text);
            CHECK(t.decode(ids) == text);
            TextStream stream(&t, {});
            for (int id : ids) {
                string more = stream.push(id);
                for (size_t at = 0; at < more.size(); at += utf8_char(more.substr(at)))
                    REQUIRE(utf8_char(more.substr(at)) > 0);
                halves += more.empty();
                shown += more;
            }
            CHECK(shown + stream.finish() == text);
        }
        CHECK(halves > 100);
    }
}

TEST_CASE("a text stops before the first stop string, and shows nothing that may begin one") {
    const Tokenizer& t = loaded(kDemo);
    std::mt19937 random(2);
    auto letters = [&](int least, int most) {
        string text;
        int n = least + int(random() % (most - least + 1));
        for (int i = 0; i < n; i++) text += "ab"[random() % 2];
        return text;
    };
    int stopped = 0;
    for (int i = 0; i < 3000; i++) {
        vector<string> stops(1 + random() % 3);
        for (string& stop : stops) stop = letters(1, 7);
        TextStream stream(&t, stops);
        string text, shown;
        for (int pieces = 0; pieces < 20; pieces++)
            for (int id : t.encode(letters(1, 3))) {
                if (stream.stopped) continue;
                text += t.bytes(id);
                shown += stream.push(id);
                REQUIRE(shown == certain(text, stops));  // all of that, and no more
            }
        size_t first = string::npos;
        for (const string& stop : stops) first = std::min(first, text.find(stop));
        CHECK(stream.stopped == (first != string::npos));
        CHECK(shown + stream.finish() == text.substr(0, first));
        if (stream.stopped) CHECK(stream.push(t.encode("a")[0]) == "");
        stopped += stream.stopped;
    }
    CHECK(stopped > 1000);
    CHECK(stopped < 2990);
}

TEST_CASE("stop strings across ids and characters, several of them, and at the end of the text") {
    const Tokenizer& t = loaded(kDemo);
    auto shown = [&](const string& text, const vector<string>& stops) {
        TextStream stream(&t, stops);
        string out;
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
    CHECK(shown("a<|im_end|>b", {}) == "ab");  // special ids have no text
    CHECK(shown("a<|im_end|>b", {"ab"}) == "");
    TextStream none(nullptr, {"a"});
    CHECK(none.push(5) + none.finish() == "");
}

TEST_CASE("special ids and ids outside the vocabulary have no text") {
    const Tokenizer& t = loaded(kDemo);
    const int special = 1, letter = t.encode("a")[0];
    CHECK(t.encode("<|im_start|>a") == vector<int>{special, letter});
    TextStream stream(&t, {});
    for (int id : {special, 49152, -1, INT_MAX}) CHECK(stream.push(id) == "");
    CHECK(stream.push(letter) == "a");
    CHECK(t.decode(vector<int>{special, letter}) == "<|im_start|>a");  // asked for all of them
}

TEST_CASE("no text is an attack: none takes far longer to encode than as much English") {
    string page = read_file(kData + "smollm2/perplexity.txt"), english;
    for (int i = 0; english.size() < 1'000'000; i++) {
        page[size_t(i) * 37 % page.size()] = char('a' + i % 26);  // no two pages are the same
        english += page;
    }
    struct Case {
        string name, text;
    };
    const vector<Case> cases = {{"English", english.substr(0, 1'000'000)},
                                {"letters", string(100'000, 'a')},
                                {"spaces", string(1'000'000, ' ')},
                                {"lines", string(1'000'000, '\n')},
                                {"digits", string(1'000'000, '7')},
                                {"marks", "a" + repeated("\u0301\u0316", 25'000)}};
    for (const string& folder : kTokenizers) {
        double of_english = 0;  // seconds a byte
        for (const Case& c : cases) {
            const Tokenizer& t = loaded(folder);
            vector<int> ids;
            double start = cpu_seconds();
            string error = error_of([&] { ids = t.encode(c.text); });
            double seconds = cpu_seconds() - start;
            CAPTURE(folder);
            CAPTURE(c.name);
            double each = seconds / double(c.text.size());
            if (c.name == "English") of_english = each;
            CAPTURE(each / of_english);
            CHECK(each < 100 * of_english);  // where time grows with the square it is thousands
            if (c.name == "marks") continue;  // to be sorted by the normalizer; may be refused
            CHECK(error == "");
            CHECK(t.decode(ids) == c.text);
        }
    }
}

TEST_CASE("a chat template that is not known is refused, and generate named") {
    for (string text :
         {"", "plain", "{% for message in messages %}[INST] {{ message['content'] }} [/INST]",
          "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
          "{{ '<|user|>\n' + message['content'] + eos_token }}"}) {
        TempFolder folder;
        folder.write("tokenizer_config.json", json{{"chat_template", text}}.dump());
        string error = error_of([&] { Chat::load(folder.path); });
        CAPTURE(error);
        CHECK(error.find("generate") != string::npos);
        CHECK(error.find('\n') == string::npos);
    }
}

TEST_CASE("a chat template is its own file, or in tokenizer_config.json, alone or in a list") {
    auto written = [](const string& file, const string& text) {
        TempFolder folder;
        folder.write("tokenizer_config.json", R"({"chat_template": "another", "bos_token": null})");
        folder.write(file, text);
        return Chat::load(folder.path).render({{"user", "hi"}});
    };
    const string expected = Chat(kQwen25, "").render({{"user", "hi"}});
    const json tools = {{"name", "tool_use"}, {"template", "x"}};
    const json usual = {{"name", "default"}, {"template", kQwen25}};
    const json list = json::array({tools, usual});
    CHECK(written("tokenizer_config.json", json{{"chat_template", kQwen25}}.dump()) == expected);
    CHECK(written("tokenizer_config.json", json{{"chat_template", list}}.dump()) == expected);
    CHECK(written("chat_template.jinja", kQwen25) == expected);  // goes before the other
}

TEST_CASE("Llama 3.1 and 3.2 put the date lines into the system message") {
    char today[32];
    time_t seconds = time(nullptr);
    strftime(today, sizeof today, "%d %b %Y", localtime(&seconds));
    auto header = [](const string& role) {
        return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
    };
    const string user = "<|eot_id|>" + header("user");
    const string assistant = "<|eot_id|>" + header("assistant");
    const vector<std::pair<string, string>> dates = {{kFixedDate, "26 Jul 2024"},
                                                     {kDateOfToday, today}};
    for (const auto& [set_date, date] : dates) {
        Chat chat(llama_template(set_date), "<|begin_of_text|>");
        const string begin = "<|begin_of_text|>" + header("system") +
                             "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n";
        CHECK(chat.render({{"user", "Hi"}}) == begin + user + "Hi" + assistant);
        CHECK(chat.render({{"system", " Be brief.\n"}, {"user", "\tHi "}}) ==
              begin + "Be brief." + user + "Hi" + assistant);
        CHECK(chat.render({{"user", "A"}, {"assistant", "\nB\n\n"}, {"user", "C"}}) ==
              begin + user + "A" + assistant + "B" + user + "C" + assistant);
    }
}

TEST_CASE("Qwen2.5's default system text comes out of its template") {
    const Chat chat(kQwen25, "");
    const string assistant = "<|im_end|>\n<|im_start|>assistant\n";
    CHECK(chat.render({{"user", "Hi"}}) == "<|im_start|>system\n" + kQwenSystem +
          "<|im_end|>\n<|im_start|>user\nHi" + assistant);
    CHECK(chat.render({{"system", ""}, {"user", " Hi "}}) ==
          "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n Hi " + assistant);
}

TEST_CASE("a chat needs a user's message last, and roles that it knows") {
    const Chat chat(kQwen25, "");
    const vector<vector<Message>> chats = {{},
                                           {{"system", "x"}},
                                           {{"user", "x"}, {"assistant", "y"}},
                                           {{"tool", "x"}, {"user", "y"}}};
    for (const vector<Message>& messages : chats) {
        string error = error_of([&] { chat.render(messages); });
        CHECK(error.starts_with("chat: "));
        CHECK(error.find('\n') == string::npos);
    }
}

TEST_CASE("a conversation's ids, turn by turn, are those of the whole rendering") {
    // the demo's vocabulary with Llama's splits and special tokens
    json j = json::parse(read_file(kDemo + "/tokenizer.json"));
    j["pre_tokenizer"]["pretokenizers"] = json::parse(R"([
        {"type": "Split", "behavior": "Isolated", "pattern": {"Regex":
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|)"
            R"( ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}])");
    int next = 49152;
    for (string token : {"begin_of_text", "start_header_id", "end_header_id", "eot_id"})
        j["added_tokens"].push_back({{"id", next++}, {"content", "<|" + token + "|>"}});
    TempFolder folder;
    folder.write("tokenizer.json", j.dump());
    const Tokenizer llama(folder.path), &smollm2 = loaded(kDemo), &qwen = loaded(kTokenizers[1]);

    auto golden_chat = [](const string& name) {
        json g = golden("chat/" + name + ".json");
        return Chat(g["template"], g["bos_token"].is_null() ? "" : g["bos_token"]);
    };
    struct Case {
        string name;
        const Tokenizer& tokenizer;
        Chat chat;
    };
    const vector<Case> cases = {
        {"smollm2", smollm2, golden_chat("smollm2")},
        {"qwen2.5", qwen, Chat(kQwen25, "")},
        {"qwen3", qwen, golden_chat("qwen3")},
        {"llama3", llama, golden_chat("llama3")},
        {"llama3.1", llama, Chat(llama_template(kFixedDate), "<|begin_of_text|>")}};
    const vector<std::pair<string, string>> talk = {{"Hello!", "Hi there."},
                                                    {"  two\n\nlines ", "1. one\n2. two"},
                                                    {"\u00E9\U0001F600?", "\u00E9!"},
                                                    {"x", ""},
                                                    {"bye", "Bye"}};
    for (const Case& c : cases)
        for (bool with_system : {false, true}) {
            CAPTURE(c.name);
            const string system = "Be kind.";
            vector<Message> messages;
            if (with_system) messages.push_back({"system", system});
            vector<int> ids;
            auto add = [&](const string& text) {
                for (int id : c.tokenizer.encode(text)) ids.push_back(id);
            };
            add(c.chat.opening(with_system ? &system : nullptr));
            for (const auto& [question, answer] : talk) {
                messages.push_back({"user", question});
                add(c.chat.user_turn(question));
                CHECK(ids == c.tokenizer.encode(c.chat.render(messages)));
                messages.push_back({"assistant", answer});
                add(answer);
                add(c.chat.end_of_turn);
            }
        }
}
