// model.hpp: the loader. Everything that is read from a model folder as Hugging Face publishes it.
//
// In reading order:
//   Config      config.json and generation_config.json, checked
//   Tokenizer   tokenizer.json: text to ids and back; TextStream: text that grows id by id
//   Chat        the chat template's format: messages to text
//   Weights     *.safetensors, mapped and checked
//   Model       the weights by name and shape, as the forward pass uses them
// Whatever is wrong with a file throws std::runtime_error: one line with what, where, what to do.
// Nothing here runs on a GPU. Read cache.hpp next.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utf8proc.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <numeric>
#include <queue>
#include <set>
#include <span>
#include <unordered_map>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

using nlohmann::json;
using std::string, std::vector;

// Limits of what a file may claim; no real model comes near them.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // safetensors header, as the reference loader
constexpr int kMaxDimension = 1 << 24;             // of any one size or id

inline string str(const auto&... args) {
    std::ostringstream out;
    (out << ... << args);
    return out.str();
}

[[noreturn]] inline void fail(const auto&... args) { throw std::runtime_error(str(args...)); }

inline string read_file(const string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in || std::filesystem::is_directory(path)) fail(path, ": cannot read this file");
    return {std::istreambuf_iterator<char>(in), {}};
}

// Parses JSON. Nothing real is nested over 64 deep, and what is would overflow the stack when
// copied. keys: receives the number of keys of the outermost object, equal ones counted each.
inline json parse_json(std::string_view text, size_t* keys = nullptr) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '"') quoted = !quoted;
        if (quoted) i += text[i] == '\\';
        else depth += (text[i] == '[' || text[i] == '{') - (text[i] == ']' || text[i] == '}');
        if (keys && !quoted && depth == 1) *keys += text[i] == ':';
        if (depth > 64) fail("JSON: nested over 64 deep; is this the right file?");
    }
    return json::parse(text);
}

// Calls load(what the file holds). Broken JSON and wrong types become one line each. optional: a
// file that does not exist is passed over.
void with_json(const string& path, auto load, bool optional = false) {
    if (optional && !std::filesystem::exists(path)) return;
    try {
        load(parse_json(read_file(path)));
    } catch (const json::exception& e) {
        fail(path, ": ", strchr(e.what(), ']') + 2, "; is the download complete?");
    }
}

// j[key], or fallback where it is missing or null.
template <class T>
T value_or(const json& j, const char* key, T fallback) {
    return j.contains(key) && !j[key].is_null() ? j[key].get<T>() : fallback;
}

// ---------------------------------------------------------------------------------------------
// Config: the shape of the model. A family is data here, not another forward pass.

struct Config {
    string type;                 // llama, mistral, qwen2 (biases on q, k, v), qwen3 (q and k norm)
    int vocab, hidden, layers;   // V, D, L: 49152, 576, 30 in SmolLM2-135M
    int heads, kv_heads;         // H query heads, KV key and value heads: 9, 3
    int head_dim, intermediate;  // HD, F: 64, 1536
    int context;                 // most positions: 8192
    float norm_eps;
    bool tied;                   // lm_head is the embedding
    vector<float> inv_freq;      // [HD / 2], rotary frequencies, scaling applied
    std::set<int> eos;           // any of these ids ends a text
    // what generation_config.json wants; 0, and 1 for top_p and repetition_penalty, is off
    float temperature = 0, top_k = 0, top_p = 1, min_p = 0, repetition_penalty = 1;

    int q_dim() const { return heads * head_dim; }
    int kv_dim() const { return kv_heads * head_dim; }
    int qkv_dim() const { return q_dim() + 2 * kv_dim(); }
};

// Frequencies of rotary position embedding (Su et al. 2021), in float as transformers computes
// them, with Llama 3.1's scaling: long wavelengths are stretched by factor, those between
// are blended.
inline vector<float> rope_frequencies(int head_dim, const json& rope, float theta) {
    vector<float> freq(head_dim / 2);
    for (int i = 0; i < head_dim / 2; i++) freq[i] = 1 / std::pow(theta, float(2 * i) / head_dim);
    string type = rope.value("rope_type", rope.value("type", "default"));
    if (type == "default") return freq;
    if (type != "llama3") fail("config.json: rope type ", type, " is not supported");
    float factor = rope.at("factor"), low = rope.at("low_freq_factor");
    float high = rope.at("high_freq_factor"), old = rope.at("original_max_position_embeddings");
    for (float& f : freq) {
        float turns = old * f / float(2 * M_PI);  // in the context before scaling
        float keep = std::clamp((turns - low) / (high - low), 0.0f, 1.0f);
        f = (1 - keep) * f / factor + keep * f;
    }
    return freq;
}

// Sizes and family; what would change the result and is not built is refused by name.
inline void read_config(const json& j, Config& c) {
    static const std::map<string, string> families = {
        {"LlamaForCausalLM", "llama"}, {"MistralForCausalLM", "mistral"},
        {"Qwen2ForCausalLM", "qwen2"}, {"Qwen3ForCausalLM", "qwen3"}};
    string name = j.at("architectures").at(0);
    if (!families.count(name)) fail("config.json: ", name, ": not Llama, Mistral, Qwen2, Qwen3");
    c.type = families.at(name);
    auto size = [&](const char* key, int64_t fallback = 0) {
        int64_t n = value_or(j, key, fallback);
        if (n < 1 || n > kMaxDimension) fail("config.json: ", key, " is ", n, ", not a size");
        return int(n);
    };
    c.vocab = size("vocab_size");
    c.hidden = size("hidden_size");
    c.layers = size("num_hidden_layers");
    c.heads = size("num_attention_heads");
    c.kv_heads = size("num_key_value_heads", c.heads);
    c.head_dim = size("head_dim", c.hidden / c.heads);
    c.intermediate = size("intermediate_size");
    c.context = size("max_position_embeddings");
    c.norm_eps = value_or(j, "rms_norm_eps", 1e-6f);
    c.tied = value_or(j, "tie_word_embeddings", false);
    const char* window = c.type[0] == 'q' ? "use_sliding_window" : "sliding_window";
    const std::map<string, json> only = {  // where they are there, nothing else will do
        {"hidden_act", "silu"}, {"attention_bias", false}, {"mlp_bias", false},
        {"partial_rotary_factor", 1.0}, {"quantization_config", nullptr}, {window, false}};
    for (const auto& [key, value] : only)
        if (j.contains(key) && !j[key].is_null() && j[key] != value)
            fail("config.json: ", key, " ", j[key].dump(), " is not supported");
    for (const json& type : value_or(j, "layer_types", json()))
        if (type != "full_attention") fail("config.json: layer type ", type, " is not supported");
    if (int64_t(c.heads) * c.head_dim > kMaxDimension) fail("config.json: heads are too large");
    if (c.heads % c.kv_heads || c.hidden % 16 || c.head_dim % 16 || c.intermediate % 16)
        fail("config.json: sizes must be multiples of 16, heads a multiple of kv heads");
    // transformers 5 keeps theta and scaling in rope_parameters, 4 keeps them apart
    json rope = value_or(j, "rope_parameters", value_or(j, "rope_scaling", json::object()));
    float theta = value_or(rope, "rope_theta", value_or(j, "rope_theta", 10000.0f));
    c.inv_freq = rope_frequencies(c.head_dim, rope, theta);
}

inline Config load_config(const string& folder) {
    if (!std::filesystem::is_directory(folder))
        fail(folder, ": no such folder; give one with config.json and model.safetensors");
    Config c;
    auto add_eos = [&](const json& j) {
        for (const json& id : value_or(j, "eos_token_id", json())) c.eos.insert(id.get<int>());
    };
    with_json(folder + "/config.json", [&](const json& j) { read_config(j, c), add_eos(j); });
    with_json(folder + "/generation_config.json", [&](const json& j) {
        add_eos(j);
        // transformers' rule: greedy, unless do_sample or a temperature asks for more
        bool has_temperature = value_or(j, "temperature", -1.0f) >= 0;
        bool sample = value_or(j, "do_sample", has_temperature);
        c.temperature = sample ? value_or(j, "temperature", 1.0f) : 0;
        c.top_k = value_or(j, "top_k", 0.0f);
        c.top_p = value_or(j, "top_p", 1.0f);
        c.min_p = value_or(j, "min_p", 0.0f);
        c.repetition_penalty = value_or(j, "repetition_penalty", 1.0f);
    }, true);
    return c;
}

// ---------------------------------------------------------------------------------------------
// UTF-8

// The first character of s: its length if it is whole and valid; 0 if s ends inside it; else minus
// the number of bytes that one U+FFFD stands for (Unicode standard, table 3-7).
inline int utf8_char(std::string_view s) {
    unsigned char b = s[0];
    int length = b < 0x80 ? 1 : b < 0xC2 ? 0 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : b < 0xF5 ? 4 : 0;
    for (int i = 1; i < length; i++) {
        if (i >= int(s.size())) return 0;
        // no overlong forms, no surrogates, nothing past U+10FFFF
        int low = i > 1 ? 0x80 : b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80;
        int high = i > 1 ? 0xBF : b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
        if ((unsigned char)s[i] < low || (unsigned char)s[i] > high) return -i;
    }
    return length ? length : -1;
}

// Moves the whole characters at the front of bytes to the end of text, bad ones as U+FFFD. What may
// still become a character stays in bytes, unless this is the end.
inline void utf8_take(string& bytes, string& text, bool end) {
    size_t i = 0;
    while (i < bytes.size()) {
        int n = utf8_char(std::string_view(bytes).substr(i));
        if (n == 0 && !end) break;
        text += n > 0 ? bytes.substr(i, n) : "\xEF\xBF\xBD";
        i += n ? std::abs(n) : bytes.size() - i;
    }
    bytes.erase(0, i);
}

// ---------------------------------------------------------------------------------------------
// Tokenizer: byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2), as Hugging Face
// tokenizers runs it: added tokens -> normalizer -> splits -> merges -> post-processor.

// A pattern of tokenizer.json, compiled by PCRE2 with its JIT.
class Regex {
public:
    explicit Regex(const string& pattern) {
        string p = with_unicode_space(pattern);
        int error;
        size_t at;
        const auto options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;  // no half characters
        code.reset(pcre2_compile((PCRE2_SPTR)p.data(), p.size(), options, &error, &at, nullptr),
                   pcre2_code_free);
        if (!code) fail("tokenizer.json: cannot compile the pattern ", pattern);
        pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // without a JIT, matching still works
    }

    // Calls found(part, matches) for every match and for what is between, from left to right.
    void split(std::string_view text, auto found) const {
        auto* match = pcre2_match_data_create(1, nullptr);
        std::shared_ptr<pcre2_match_data> owner(match, pcre2_match_data_free);
        const size_t* at = pcre2_get_ovector_pointer(match);
        for (size_t done = 0; done < text.size(); done = at[1]) {
            // UTF-8 is checked once, at the beginning
            auto options = PCRE2_NOTEMPTY | (done ? PCRE2_NO_UTF_CHECK : 0);
            auto attempt = [&](int more) {
                return pcre2_match(code.get(), (PCRE2_SPTR)text.data(), text.size(), done,
                                   options | more, match, nullptr);
            };
            int rc = attempt(0);
            if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = attempt(PCRE2_NO_JIT);  // uses the heap
            if (rc == PCRE2_ERROR_NOMATCH) return found(text.substr(done), false);
            if (rc <= PCRE2_ERROR_UTF8_ERR1 && rc >= PCRE2_ERROR_UTF8_ERR21)
                fail("prompt: invalid UTF-8 at byte ", pcre2_get_startchar(match),
                     "; convert the text to UTF-8 first");
            if (rc < 0) fail("prompt: the tokenizer's pattern gave up at byte ", done);
            if (at[0] > done) found(text.substr(done, at[0] - done), false);
            found(text.substr(at[0], at[1] - at[0]), true);
        }
    }

    // The last match in text, or "".
    string find(std::string_view text) const {
        string last;
        split(text, [&](std::string_view part, bool matches) { if (matches) last = part; });
        return last;
    }

private:
    // \s must be Unicode's White_Space; PCRE2's own still holds U+180E.
    static string with_unicode_space(string p) {
        for (size_t i = 0; i + 1 < p.size(); i++) {
            if (p[i] != '\\') continue;
            if (p[i + 1] == 's') p.replace(i, 2, "\\p{White_Space}");
            if (p[i + 1] == 'S') p.replace(i, 2, "\\P{White_Space}");
            i++;  // over what is escaped
        }
        return p;
    }

    std::shared_ptr<pcre2_code> code;
};

class Tokenizer {
public:
    int eos = -1;  // from tokenizer_config.json, if it names one

    // Reads folder/tokenizer.json. What it asks for and is not built is refused by name.
    explicit Tokenizer(const string& folder) {
        with_json(folder + "/tokenizer.json", [&](const json& j) {
            // a component is nothing, itself, or the list of a Sequence
            auto parts = [&](const char* name, const char* list) {
                json part = value_or(j, name, json({{"type", "Sequence"}, {list, json::array()}}));
                return part.at("type") == "Sequence" ? part.at(list) : json::array({part});
            };
            load_vocabulary(j.at("model"));
            for (const json& part : parts("normalizer", "normalizers")) {
                if (part.at("type") != "NFC") unsupported("normalizer", part);
                nfc = true;
            }
            add_tokens(value_or(j, "added_tokens", json()));
            for (const json& part : parts("pre_tokenizer", "pretokenizers")) add_split(part);
            for (const json& part : parts("post_processor", "processors")) add_template(part);
        });
        with_json(folder + "/tokenizer_config.json", [&](const json& j) {
            eos = find(added, token_text(j, "eos_token"));
        }, true);
    }

    // The text of a token that tokenizer_config.json names: a string, or an object around it.
    static string token_text(const json& config, const char* key) {
        json token = value_or(config, key, json(""));
        return token.is_object() ? token.at("content") : token;
    }

    // text -> ids; invalid UTF-8 is an error with its offset. special: add what the post-processor
    // adds (bos). Special strings inside the text become their ids, as in Hugging Face.
    vector<int> encode(std::string_view text, bool special = false) const {
        vector<int> ids = special ? prefix : vector<int>();
        any_added.split(text, [&](std::string_view part, bool matches) {
            if (matches) ids.push_back(find(added, string(part)));
            else encode_words(part, ids);
        });
        if (special) ids.insert(ids.end(), suffix.begin(), suffix.end());
        return ids;
    }

    // ids -> text; what is no UTF-8 becomes U+FFFD.
    string decode(std::span<const int> ids) const {
        string raw, text;
        for (int id : ids) raw += bytes(id);
        utf8_take(raw, text, true);
        return text;
    }

    // The bytes that an id stands for; none for an id that the vocabulary leaves out.
    string bytes(int id) const { return id >= 0 && id < int(pieces.size()) ? pieces[id] : ""; }
    bool is_special(int id) const { return specials.count(id) > 0; }

private:
    vector<string> pieces;                         // id -> bytes
    std::unordered_map<string, int> vocab, added;  // bytes -> id; text -> id
    std::unordered_map<uint64_t, int> ranks;       // pair(left id, right id) -> rank of its merge
    vector<int> merged;                            // rank -> id
    std::set<int> specials;
    Regex any_added{"(?!)"};     // any added token, the longest first
    bool nfc = false;            // normalize to this form
    vector<Regex> splits;        // what matches stands alone, and what is between
    vector<int> prefix, suffix;  // what the post-processor adds
    bool ignore_merges = false;  // a word in the vocabulary is one id

    static uint64_t pair(int left, int right) { return uint64_t(left) << 32 | uint32_t(right); }

    static int find(const auto& map, const auto& key) {  // -1: not there
        auto found = map.find(key);
        return found == map.end() ? -1 : found->second;
    }

    [[noreturn]] static void unsupported(const char* part, const json& what) {
        fail("tokenizer.json: ", part, " ", what.dump(), " is not supported, byte-level BPE is");
    }

    // GPT-2 writes each byte as a printable character: itself, or the next free one from U+0100 on.
    // Undoes that; a text with any other character stays as it is.
    static string from_byte_level(const string& text) {
        static const vector<int> byte_of = [] {
            vector<int> table(0x144, -1);
            for (int b = 0, next = 0x100; b < 256; b++)
                table[(b > 32 && b < 127) || (b > 160 && b != 173) ? b : next++] = b;
            return table;
        }();
        string out;
        for (size_t i = 0; i < text.size();) {
            int code;
            i += utf8proc_iterate((const utf8proc_uint8_t*)&text[i], -1, &code);
            if (code >= int(byte_of.size()) || byte_of[code] < 0) return text;
            out += char(byte_of[code]);
        }
        return out;
    }

    const string& add_piece(const string& text, int id) {
        if (id < 0 || id >= kMaxDimension) fail("tokenizer.json: id ", id, " is out of range");
        if (id >= int(pieces.size())) pieces.resize(id + 1);
        return pieces[id] = from_byte_level(text);
    }

    void load_vocabulary(const json& j) {
        if (value_or(j, "type", string("BPE")) != "BPE") unsupported("type", j["type"]);
        if (value_or(j, "byte_fallback", false)) unsupported("byte_fallback", true);
        for (const char* affix : {"end_of_word_suffix", "continuing_subword_prefix"})
            if (value_or(j, affix, string()) != "") unsupported(affix, j[affix]);
        ignore_merges = value_or(j, "ignore_merges", false);
        for (const auto& [text, id] : j.at("vocab").items()) vocab[add_piece(text, id)] = id;
        for (const json& merge : j.at("merges")) {  // "a b", or ["a", "b"] in newer files
            string text = merge.is_string() ? merge.get<string>() : "";
            size_t space = text.find(' ');
            string left = merge.is_string() ? text.substr(0, space) : merge.at(0).get<string>();
            string right = merge.is_string() ? text.substr(space + 1) : merge.at(1).get<string>();
            left = from_byte_level(left), right = from_byte_level(right);
            int l = find(vocab, left), r = find(vocab, right), both = find(vocab, left + right);
            if (l < 0 || r < 0 || both < 0) unsupported("merge of unknown tokens", merge);
            ranks[pair(l, r)] = int(merged.size());
            merged.push_back(both);
        }
    }

    void add_tokens(const json& list) {
        vector<string> texts;
        for (const json& token : list) {
            const string& text = texts.emplace_back(token.at("content"));
            for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized"})
                if (value_or(token, flag, false) && (nfc || flag != string("normalized")))
                    unsupported(flag, token);
            int id = added[text] = token.at("id");
            add_piece(text, id);
            if (value_or(token, "special", false)) specials.insert(id);
        }
        std::ranges::sort(texts, std::greater(), &string::size);  // the longest first
        string any;
        for (const string& text : texts) {
            any += '|';
            for (char c : text) any += isalnum(c) || (c & 0x80) ? string(1, c) : string{'\\', c};
        }
        if (!texts.empty()) any_added = Regex(any.substr(1));
    }

    void add_split(const json& j) {
        static const char* gpt2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+|"
                                  " ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
        string type = j.at("type");
        if (type == "Split" && j.at("behavior") == "Isolated" && j.at("pattern").contains("Regex"))
            splits.emplace_back(j["pattern"]["Regex"].get<string>());
        else if (type == "Digits")
            splits.emplace_back(value_or(j, "individual_digits", false) ? "\\p{N}" : "\\p{N}+");
        else if (type == "ByteLevel" && !value_or(j, "add_prefix_space", true)) {
            if (value_or(j, "use_regex", true)) splits.emplace_back(gpt2);
        } else unsupported("pre_tokenizer", j);
    }

    void add_template(const json& j) {
        if (j.at("type") == "ByteLevel") return;  // moves offsets only
        if (j["type"] != "TemplateProcessing") unsupported("post_processor", j["type"]);
        vector<int>* side = &prefix;
        for (const json& part : j.at("single")) {
            if (part.contains("Sequence")) {
                side = &suffix;
                continue;
            }
            const json& token = j.at("special_tokens").at(part.at("SpecialToken").at("id"));
            for (int id : token.at("ids")) side->push_back(id);
        }
    }

    // text between added tokens: normalized, split into words, merged word by word.
    void encode_words(std::string_view raw, vector<int>& ids) const {
        string text(raw);
        if (nfc) {
            static const Regex absurd("\\p{M}{256}");  // sorting n of them takes n^2 steps
            if (absurd.find(raw) != "") fail("prompt: 256 combining marks in a row; remove some");
            utf8proc_uint8_t* form = nullptr;
            const auto options = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
            auto size = utf8proc_map((utf8proc_uint8_t*)raw.data(), raw.size(), &form, options);
            if (size < 0) fail("prompt: cannot be normalized: ", utf8proc_errmsg(size));
            text.assign((char*)form, size);
            free(form);
        }
        vector<std::string_view> words = {text};
        for (const Regex& split : splits) {
            vector<std::string_view> parts;
            auto add = [&](std::string_view part, bool) { parts.push_back(part); };
            for (std::string_view word : words) split.split(word, add);
            words.swap(parts);
        }
        for (std::string_view word : words) merge(string(word), ids);
    }

    // Joins the pair of lowest rank, the leftmost of equals, as long as there is one: a heap of the
    // pairs and a linked list of the symbols, O(n log n) for a word of n bytes.
    void merge(const string& word, vector<int>& ids) const {
        int whole = ignore_merges ? find(vocab, word) : -1;
        if (whole >= 0) return ids.push_back(whole);
        vector<int> symbols;
        for (char byte : word) symbols.push_back(find(vocab, string(1, byte)));
        std::erase(symbols, -1);  // a byte without an id is left out, as in Hugging Face
        const int end = int(symbols.size());
        vector<int> next(end), previous(end);
        std::iota(next.begin(), next.end(), 1);
        std::iota(previous.begin(), previous.end(), -1);

        std::priority_queue<std::pair<int, int>, vector<std::pair<int, int>>, std::greater<>> heap;
        auto rank_at = [&](int at) {  // of merging this symbol with the next
            if (at < 0 || next[at] == end) return -1;
            return find(ranks, pair(symbols[at], symbols[next[at]]));
        };
        auto push = [&](int at) {
            if (int rank = rank_at(at); rank >= 0) heap.emplace(rank, at);
        };
        for (int i = 0; i < end; i++) push(i);
        while (!heap.empty()) {
            auto [rank, at] = heap.top();
            heap.pop();
            if (rank_at(at) != rank) continue;  // out of date
            symbols[at] = merged[rank];
            symbols[next[at]] = -1;  // merges with nothing
            next[at] = next[next[at]];
            if (next[at] < end) previous[next[at]] = at;
            push(previous[at]);
            push(at);
        }
        for (int i = 0; i < end; i = next[i]) ids.push_back(symbols[i]);
    }
};

// Text that grows id by id. Nothing is given out that could still change: no half character, no
// beginning of a stop string; a stop string itself never shows.
class TextStream {
public:
    bool stopped = false;  // a stop string has come

    // tokenizer: null gives no text at all. stops: none of them empty.
    TextStream(const Tokenizer* tokenizer, vector<string> stops)
        : tokenizer(tokenizer), stops(std::move(stops)) {}

    // Takes one more id (special ones have no text), or with last = true none: what is certain now.
    string push(int id, bool last = false) {
        if (!tokenizer || stopped) return "";
        if (!last && !tokenizer->is_special(id)) raw += tokenizer->bytes(id);
        utf8_take(raw, held, last);
        size_t sure = held.size();
        for (const string& stop : stops)
            if (held.find(stop) < sure) sure = held.find(stop), stopped = true;
        for (const string& stop : stops)  // could the end become this stop string?
            for (size_t n = 1; n < stop.size() && n <= held.size() && !stopped && !last; n++)
                if (held.ends_with(stop.substr(0, n))) sure = std::min(sure, held.size() - n);
        string out = held.substr(0, sure);
        held.erase(0, sure);
        return out;
    }
    string finish() { return push(-1, true); }

private:
    const Tokenizer* tokenizer;
    vector<string> stops;
    string raw, held;  // bytes of an unfinished character; text that may become a stop string
};

// ---------------------------------------------------------------------------------------------
// Chat: the two formats of the supported families, recognised from the template's text. Jinja is
// not interpreted: what a known template does is written out here instead.

struct Message {
    string role, content;  // role: system, user or assistant
};

// Without the white space at both ends, as Python's str.strip().
inline string trim(const string& text) {
    static const Regex content("(?s)[^\\s\\x1C-\\x1F](.*[^\\s\\x1C-\\x1F])?");
    return content.find(text);
}

class Chat {
public:
    bool thinking = true;  // Qwen3: false asks for an answer without a thought
    string date;           // Llama 3.1 and later put one into the system message: "26 Jul 2024"
    string end_of_turn;    // what follows an answer

    // The template is chat_template.jinja, or chat_template in tokenizer_config.json.
    static Chat load(const string& folder) {
        string text, bos, jinja = folder + "/chat_template.jinja";
        with_json(folder + "/tokenizer_config.json", [&](const json& j) {
            bos = Tokenizer::token_text(j, "bos_token");
            json list = value_or(j, "chat_template", json(""));  // a text, or several with names
            if (list.is_string()) list = {{{"name", "default"}, {"template", list}}};
            for (const json& one : list) if (one.at("name") == "default") text = one.at("template");
        }, true);
        if (std::filesystem::exists(jinja)) text = read_file(jinja);
        if (text.empty()) fail(folder, ": no chat template; use nanocu generate");
        return Chat(text, bos);
    }

    Chat(const string& jinja, const string& bos_token) {
        auto has = [&](const char* piece) { return jinja.find(piece) != string::npos; };
        llama = has("'<|start_header_id|>' + message") && has("trim");
        drops_thoughts = has("</think>");
        if (has("'<think>\\n\\n</think>\\n\\n'")) no_thought = "<think>\n\n</think>\n\n";
        if (has("'<|im_start|>assistant\\n<think>\\n'")) begins_with = "<think>\n";
        bool unknown_thoughts = drops_thoughts && no_thought.empty() && begins_with.empty();
        if (llama == has("'<|im_start|>' + message") || unknown_thoughts)
            fail("chat template: neither ChatML nor Llama 3; use nanocu generate");
        end_of_turn = llama ? "<|eot_id|>" : "<|im_end|>\n";
        if (has("bos_token")) bos = bos_token;
        if (llama && has("Cutting Knowledge Date")) {
            time_t now = time(nullptr);
            date = Regex("(?<=date_string = \")[^\"]+").find(jinja);
            if (has("strftime_now")) date = str(std::put_time(localtime(&now), "%d %b %Y"));
        }
        // ChatML's default system text stands in the template; its newline may be written as \n
        Regex system_text("<\\|im_start\\|>system(\n|\\\\n)\\K[^'\"{}]+(?=<\\|im_end\\|>)");
        if (!llama) default_system = system_text.find(jinja);
    }

    // The messages, and the beginning of an answer to the last, which must be the user's.
    string render(const vector<Message>& messages) const {
        if (messages.empty() || messages.back().role != "user")
            fail("chat: the last message must be the user's");
        bool system = messages[0].role == "system";
        string text = opening(system ? &messages[0].content : nullptr);
        for (size_t i = system; i < messages.size(); i++) {
            const auto& [role, content] = messages[i];
            if (role != "assistant" && role != "user" && role != "system")
                fail("chat: role ", role, " is not supported; system, user and assistant are");
            text += turn(role, role == "assistant" ? without_thought(content) : content);
        }
        return text + answer();
    }

    // The parts of a rendering, for a conversation that grows turn by turn. system may be null.
    string opening(const string* system) const {
        string dated = "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n";
        string text = system ? *system : default_system;
        if (!date.empty()) return bos + header("system") + dated + trim(text) + end_of_turn;
        return system || !text.empty() ? bos + turn("system", text) : bos;
    }
    string user_turn(const string& text) const { return turn("user", text) + answer(); }

private:
    string header(const string& role) const {
        if (llama) return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
        return "<|im_start|>" + role + "\n";
    }
    string turn(const string& role, const string& content) const {
        return header(role) + (llama ? trim(content) : content) + end_of_turn;
    }
    string answer() const {
        return header("assistant") + begins_with + (thinking ? "" : no_thought);
    }
    string without_thought(const string& content) const {  // Qwen3, in earlier answers
        size_t end = drops_thoughts ? content.rfind("</think>") : string::npos;
        if (end == string::npos) return content;
        return content.substr(std::min(content.find_first_not_of('\n', end + 8), content.size()));
    }

    bool llama, drops_thoughts;
    string bos, default_system, no_thought, begins_with;  // the last two: how an answer begins
};

// ---------------------------------------------------------------------------------------------
// Weights: the tensors of *.safetensors by name. Such a file is a 64-bit little-endian length, that
// many bytes of JSON, and the data; what the header says is checked before any of it is used.

using bf16 = uint16_t;  // the upper half of a float

inline float bf16_to_float(bf16 b) { return std::bit_cast<float>(uint32_t(b) << 16); }

inline bf16 float_to_bf16(float f) {  // to the nearest, ties to even
    uint32_t bits = std::bit_cast<uint32_t>(f);
    return std::isnan(f) ? 0x7FC0 : bf16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float f = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(fraction, -24);
    if (exponent == 31) f = fraction ? NAN : INFINITY;
    return h & 0x8000 ? -f : f;
}

template <class T>
T unaligned(const void* data) {
    T value;
    memcpy(&value, data, sizeof value);
    return value;
}

// [rows, cols], bf16, row-major.
struct Matrix {
    const bf16* data = nullptr;
    int rows = 0, cols = 0;
    const bf16* row(int i) const { return data + size_t(i) * cols; }
};

class Weights {
public:
    uint64_t bytes = 0;  // of all tensors asked for, as bf16
    string rounded;      // the dtype that was rounded to bf16, if any

    // Maps folder/model.safetensors or the shards of its index. dummy: maps nothing, and any tensor
    // asked for is random.
    Weights(const string& folder, bool dummy) : folder(folder), dummy(dummy) {
        if (dummy) return;
        string single = "model.safetensors", index = folder + "/" + single + ".index.json";
        std::set<string> files;
        if (!std::filesystem::exists(folder + "/" + single)) with_json(index, [&](const json& j) {
            for (const json& name : j.at("weight_map")) files.insert(name.get<string>());
        }, true);
        if (files.empty()) files.insert(single);
        for (const string& file : files) map_file(file);
    }
    Weights(const Weights&) = delete;
    ~Weights() {
        for (auto& map : maps) munmap(map.data(), map.size());
    }

    // The tensor of this name and shape: in the mapping if the file holds bf16, else rounded into
    // memory of its own. Lives as long as this object.
    Matrix get(const string& name, int rows, int cols) {
        return {find(name, {rows, cols}, uint64_t(rows) * cols), rows, cols};
    }

    vector<float> get(const string& name, int n) {
        const bf16* data = find(name, {n}, n);
        vector<float> out(n);
        std::transform(data, data + n, out.begin(), bf16_to_float);
        return out;
    }

private:
    struct Tensor {
        string dtype;
        json shape;
        const char* data;
    };

    const bf16* find(const string& name, const json& shape, uint64_t count) {
        bytes += count * sizeof(bf16);
        if (dummy) return random(name.ends_with("norm.weight"), count);
        if (!tensors.count(name)) fail(folder, ": no tensor ", name, "; is a file missing?");
        const Tensor& t = tensors.at(name);
        if (t.shape != shape)
            fail(folder, ": ", name, " is ", t.shape, ", but config.json asks for ", shape);
        if (t.dtype == "BF16" && uintptr_t(t.data) % alignof(bf16) == 0) return (const bf16*)t.data;
        if (t.dtype != "BF16") rounded = t.dtype;
        return own(count, [&](uint64_t i) {
            if (t.dtype == "F32") return unaligned<float>(t.data + 4 * i);
            auto half = unaligned<uint16_t>(t.data + 2 * i);
            return t.dtype == "F16" ? f16_to_float(half) : bf16_to_float(half);
        });
    }

    // Ones for norms, else uniform with deviation 0.02; the same in every run.
    const bf16* random(bool ones, uint64_t count) {
        uint64_t seed = owned.size() << 40;
        return own(count, [=](uint64_t i) {
            uint64_t z = (seed + i) * 0x9E3779B97F4A7C15;  // splitmix64 (Steele et al. 2014)
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
            return ones ? 1 : 0.0346f * float(int32_t(z >> 32)) / 0x1p31f;
        });
    }

    // Memory of our own that holds value(i), rounded.
    const bf16* own(uint64_t count, auto value) {
        bf16* out = owned.emplace_back(new bf16[count]).get();
        #pragma omp parallel for
        for (uint64_t i = 0; i < count; i++) out[i] = float_to_bf16(value(i));
        return out;
    }

    void map_file(const string& file) {
        string path = folder + "/" + file;
        bool inside = file.find('/') == string::npos;  // of the folder
        if (!inside || !std::filesystem::is_regular_file(path))
            fail(path, ": missing; download the whole model, or use --load-format dummy");
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        uint64_t size = std::filesystem::file_size(path);
        void* data = size < 8 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
        close(fd);
        if (data == MAP_FAILED) fail(path, ": cannot be mapped; cut short? download it again");
        std::span<char> map = maps.emplace_back((char*)data, size);
        madvise(data, size, MADV_WILLNEED);
        auto length = unaligned<uint64_t>(data);
        if (length > std::min(kMaxHeaderBytes, size - 8))
            fail(path, ": a header of ", length, " bytes is too long; download it again");
        try {
            read_header(path, map.subspan(8, length), map.subspan(8 + length));
        } catch (const json::exception& e) {
            fail(path, ": broken header: ", e.what(), "; download it again");
        }
    }

    // The tensors must fill data without overlap, hole or rest.
    void read_header(const string& path, std::span<char> text, std::span<char> data) {
        size_t names = 0;  // the parser keeps the last of two equal names
        json header = parse_json({text.data(), text.size()}, &names);
        if (names != header.size()) fail(path, ": two tensors of the same name; download it again");
        header.erase("__metadata__");
        auto number = [](const json& n) { return n.is_number_unsigned() ? n.get<uint64_t>() : -1; };
        std::set<std::tuple<uint64_t, uint64_t, string>> ranges;
        for (const auto& [name, t] : header.items()) {
            string dtype = t.at("dtype");
            uint64_t need = dtype == "F32" ? 4 : dtype == "F16" || dtype == "BF16" ? 2 : 0;
            if (!need) fail(path, ": ", name, " is ", dtype, "; supported are BF16, F16, F32");
            for (const json& n : t.at("shape"))
                if (__builtin_mul_overflow(need, number(n), &need)) need = UINT64_MAX - 1;
            const json& offsets = t.at("data_offsets");
            uint64_t begin = number(offsets.at(0)), end = number(offsets.at(1));
            if (begin > end || end > data.size() || end - begin != need)
                fail(path, ": ", name, " does not fit its offsets or the file; download it again");
            ranges.insert({begin, end, name});
            if (!tensors.emplace(name, Tensor{dtype, t["shape"], data.data() + begin}).second)
                fail(path, ": tensor ", name, " is in two files");
        }
        uint64_t filled = 0;
        for (const auto& [begin, end, name] : ranges) {
            if (begin != filled)
                fail(path, ": overlap or hole before ", name, "; download it again");
            filled = end;
        }
        if (filled != data.size()) fail(path, ": bytes behind the last tensor; download it again");
    }

    string folder;
    bool dummy;
    std::map<string, Tensor> tensors;
    vector<std::span<char>> maps;
    vector<std::unique_ptr<bf16[]>> owned;
};

// ---------------------------------------------------------------------------------------------
// Model

struct Layer {
    vector<float> attn_norm, mlp_norm;  // [D]
    vector<float> q_norm, k_norm;       // [HD], Qwen3; else empty
    vector<float> bias;                 // [(H + 2 KV) HD] of q, k, v, Qwen2; else zeros
    Matrix q, k, v, o;                  // [H HD, D], [KV HD, D] twice, [D, H HD]
    Matrix gate, up, down;              // [F, D] twice, [D, F]
};

struct Model {
    Config config;
    Weights weights;
    Matrix embed, lm_head;     // [V, D]; the same one if tied
    vector<float> final_norm;  // [D]
    vector<Layer> layers;      // [L]

    explicit Model(const string& folder, bool dummy = false)
        : config(load_config(folder)), weights(folder, dummy) {
        const Config& c = config;
        embed = weights.get("model.embed_tokens.weight", c.vocab, c.hidden);
        lm_head = c.tied ? embed : weights.get("lm_head.weight", c.vocab, c.hidden);
        final_norm = weights.get("model.norm.weight", c.hidden);
        for (int i = 0; i < c.layers; i++) {
            Layer l;
            string at = str("model.layers.", i, "."), attn = at + "self_attn.", mlp = at + "mlp.";
            l.attn_norm = weights.get(at + "input_layernorm.weight", c.hidden);
            l.mlp_norm = weights.get(at + "post_attention_layernorm.weight", c.hidden);
            l.q = weights.get(attn + "q_proj.weight", c.q_dim(), c.hidden);
            l.k = weights.get(attn + "k_proj.weight", c.kv_dim(), c.hidden);
            l.v = weights.get(attn + "v_proj.weight", c.kv_dim(), c.hidden);
            l.o = weights.get(attn + "o_proj.weight", c.hidden, c.q_dim());
            l.gate = weights.get(mlp + "gate_proj.weight", c.intermediate, c.hidden);
            l.up = weights.get(mlp + "up_proj.weight", c.intermediate, c.hidden);
            l.down = weights.get(mlp + "down_proj.weight", c.hidden, c.intermediate);
            for (const char* name : {"q_proj.bias", "k_proj.bias", "v_proj.bias"}) {
                vector<float> part(name[0] == 'q' ? c.q_dim() : c.kv_dim());
                if (c.type == "qwen2") part = weights.get(attn + name, int(part.size()));
                l.bias.insert(l.bias.end(), part.begin(), part.end());
            }
            if (c.type == "qwen3") l.q_norm = weights.get(attn + "q_norm.weight", c.head_dim);
            if (c.type == "qwen3") l.k_norm = weights.get(attn + "k_norm.weight", c.head_dim);
            layers.push_back(std::move(l));
        }
    }
};
