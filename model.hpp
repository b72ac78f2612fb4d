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

#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>
#include <span>
#include <unordered_map>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

using nlohmann::json;
using std::string, std::vector;

constexpr int kMaxDimension = 1 << 24;  // no file may have a larger size or id; no real one has

inline string str(const auto&... args) { return (std::ostringstream() << ... << args).str(); }
[[noreturn]] inline void fail(const auto&... args) { throw std::runtime_error(str(args...)); }

inline string read_file(const string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in || std::filesystem::is_directory(path)) fail(path, ": cannot read this file");
    return str(in.rdbuf());
}

// Parses JSON. It refuses what is nested over 64 deep, as no real file is: a copy of it would
// overflow the stack. keys: receives how many keys the outermost object has, equal ones included.
inline json parse_json(std::string_view text, size_t* keys = nullptr) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); i++) {
        char c = text[i];
        if (c == '"') quoted = !quoted;
        if (quoted && c == '\\') i++;
        if (quoted) continue;
        if (c == '[' || c == '{') depth++;
        if (c == ']' || c == '}') depth--;
        if (keys && depth == 1 && c == ':') ++*keys;
        if (depth > 64) fail("JSON: nested over 64 deep; is this the right file?");
    }
    return json::parse(text);
}

// Runs work. What it throws becomes an error of one line that begins with the file's path.
void in_file(const string& path, auto work) {
    try {
        work();
    } catch (const json::exception& e) {  // broken JSON or a wrong type; begins with "[kind] "
        fail(path, ": ", strchr(e.what(), ']') + 2, "; is the download complete?");
    } catch (const std::exception& e) {
        fail(path, ": ", e.what());
    }
}

// Calls load with the JSON in a file. optional: the file need not exist.
void with_json(const string& path, auto load, bool optional = false) {
    if (optional && !std::filesystem::exists(path)) return;
    string text = read_file(path);
    in_file(path, [&] { load(parse_json(text)); });
}

inline void need_folder(const string& folder) {
    if (!std::filesystem::is_directory(folder))
        fail(folder, ": no such folder; give one with config.json and model.safetensors");
}

// j[key], or fallback if j has no such key, or null there.
auto value_or(const json& j, const string& key, auto fallback) {
    return j.contains(key) && !j[key].is_null() ? j[key].get<decltype(fallback)>() : fallback;
}

// Refuses what is not built: if j has one of these keys, it must have this value. The error begins
// with whose and names the key.
inline void only(const json& j, const std::map<string, json>& built, const string& whose = "") {
    for (const auto& [key, value] : built)
        if (value_or(j, key, value) != value) fail(whose, key, " ", j[key], " is not supported");
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
    vector<float> inv_freq;      // [HD / 2], rotary frequencies, scaled already
    std::set<int> eos;           // any of these ids ends a text
    // what generation_config.json wants; 0 is off, for top_p and repetition_penalty 1 is
    float temperature = 0, top_k = 0, top_p = 1, min_p = 0, repetition_penalty = 1;

    int q_dim() const { return heads * head_dim; }
    int kv_dim() const { return kv_heads * head_dim; }
    int qkv_dim() const { return q_dim() + 2 * kv_dim(); }
};

// Reads the frequencies of rotary position embedding (Su et al. 2021), in float as transformers
// computes them. Llama 3.1 scales them: it divides low frequencies by a factor, leaves high ones as
// they are, and blends the two between.
inline void read_rope(const json& j, Config& c) {
    // transformers 5 keeps theta and scaling in rope_parameters, 4 keeps them apart
    json rope = value_or(j, "rope_parameters", value_or(j, "rope_scaling", json::object()));
    float theta = value_or(rope, "rope_theta", value_or(j, "rope_theta", 10000.0f));
    for (int i = 0; i < c.head_dim; i += 2)
        c.inv_freq.push_back(1 / std::pow(theta, float(i) / c.head_dim));
    string type = rope.value("rope_type", rope.value("type", "default"));
    if (type == "default") return;
    if (type != "llama3") fail("rope type ", type, " is not supported");
    float factor = rope.at("factor"), low = rope.at("low_freq_factor");
    float high = rope.at("high_freq_factor"), old = rope.at("original_max_position_embeddings");
    for (float& f : c.inv_freq) {
        float turns = old * f / float(2 * M_PI);  // in a context of the length before scaling
        float keep = std::clamp((turns - low) / (high - low), 0.0f, 1.0f);
        f = (1 - keep) * f / factor + keep * f;
    }
}

// Reads sizes and family, and refuses by name what is not built and would change the result.
inline void read_config(const json& j, Config& c) {
    static const std::map<string, string> families = {
        {"LlamaForCausalLM", "llama"}, {"MistralForCausalLM", "mistral"},
        {"Qwen2ForCausalLM", "qwen2"}, {"Qwen3ForCausalLM", "qwen3"}};
    string name = j.at("architectures").at(0);
    if (!families.count(name)) fail(name, ": not Llama, Mistral, Qwen2 or Qwen3");
    c.type = families.at(name);
    auto size = [&](const char* key, int64_t fallback = 0, int most = kMaxDimension) {
        int64_t n = value_or(j, key, fallback);
        if (n < 1 || n > most) fail(key, " is ", n, ", not a size");
        return int(n);
    };
    c.vocab = size("vocab_size");
    c.hidden = size("hidden_size");
    c.layers = size("num_hidden_layers");
    c.heads = size("num_attention_heads");
    c.kv_heads = size("num_key_value_heads", c.heads);
    c.head_dim = size("head_dim", c.hidden / c.heads, kMaxDimension / c.heads);
    c.intermediate = size("intermediate_size");
    c.context = size("max_position_embeddings");
    c.norm_eps = value_or(j, "rms_norm_eps", 1e-6f);
    c.tied = value_or(j, "tie_word_embeddings", false);
    bool qwen = c.type.starts_with("qwen");  // has a size of window, and a switch for it
    const char* window = qwen ? "use_sliding_window" : "sliding_window";
    only(j, {{"hidden_act", "silu"}, {"attention_bias", false}, {"mlp_bias", false},
             {"partial_rotary_factor", 1.0}, {"quantization_config", nullptr}, {window, false}});
    for (const json& type : value_or(j, "layer_types", json()))
        if (type != "full_attention") fail("layer type ", type, " is not supported");
    if (c.heads % c.kv_heads || c.hidden % 16 || c.head_dim % 16 || c.intermediate % 16)
        fail("sizes must be multiples of 16, heads a multiple of kv heads");
    read_rope(j, c);
}

inline Config load_config(const string& folder) {
    need_folder(folder);
    Config c;
    auto add_eos = [&](const json& j) {
        for (const json& id : value_or(j, "eos_token_id", json())) c.eos.insert(id.get<int>());
    };
    with_json(folder + "/config.json", [&](const json& j) {
        read_config(j, c);
        add_eos(j);
    });
    with_json(folder + "/generation_config.json", [&](const json& j) {
        add_eos(j);
        // as in transformers: the likeliest id, unless do_sample or a temperature asks for a draw
        bool has_temperature = value_or(j, "temperature", -1.0f) >= 0;
        bool draws = value_or(j, "do_sample", has_temperature);
        if (draws) c.temperature = has_temperature ? j["temperature"].get<float>() : 1;
        c.top_k = value_or(j, "top_k", 0.0f);
        c.top_p = value_or(j, "top_p", 1.0f);
        c.min_p = value_or(j, "min_p", 0.0f);
        c.repetition_penalty = value_or(j, "repetition_penalty", 1.0f);
    }, true);
    return c;
}

// ---------------------------------------------------------------------------------------------
// UTF-8

// The length of the first character of s, if it is whole and valid; 0 if s ends inside it; else
// minus the number of bytes that one U+FFFD stands for (Unicode standard, table 3-7).
inline int utf8_char(std::string_view s) {
    for (int n = std::min(4, int(s.size())); n > 0; n--) {
        // If n bytes are a character or the beginning of one, one of these makes it whole.
        for (const char* rest : {"\x80\x80\x80", "\xBF\xBF\xBF"}) {
            string whole = string(s.substr(0, n)) + rest;
            int code;
            auto length = utf8proc_iterate((utf8proc_uint8_t*)whole.data(), whole.size(), &code);
            if (length <= 0) continue;
            if (length <= n) return int(length);
            return n < int(s.size()) ? -n : 0;
        }
    }
    return -1;
}

// Moves whole characters from the front of bytes to the end of text, and U+FFFD for bytes that are
// none. An unfinished character stays in bytes, unless this is the end.
inline void utf8_take(string& bytes, string& text, bool end) {
    size_t i = 0;
    while (i < bytes.size()) {
        int n = utf8_char(std::string_view(bytes).substr(i));
        if (n == 0 && !end) break;
        text += n > 0 ? bytes.substr(i, n) : "\xEF\xBF\xBD";
        i += n != 0 ? std::abs(n) : bytes.size() - i;
    }
    bytes.erase(0, i);
}

// ---------------------------------------------------------------------------------------------
// Tokenizer: byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2), as Hugging Face
// tokenizers runs it: added tokens -> normalizer -> splits -> merges -> post-processor.

using Regex = std::shared_ptr<pcre2_code>;

inline Regex compile(string pattern) {
    // \s must be Unicode's White_Space; PCRE2's own still holds U+180E
    for (size_t i = 0; (i = pattern.find('\\', i)) != string::npos; i += 2) {
        if (pattern[i + 1] == 's') pattern.replace(i, 2, "\\p{White_Space}");
        if (pattern[i + 1] == 'S') pattern.replace(i, 2, "\\P{White_Space}");
    }
    int error;
    size_t at;
    const auto options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;  // no half characters
    Regex regex(pcre2_compile((PCRE2_SPTR)pattern.data(), pattern.size(), options, &error, &at,
                              nullptr), pcre2_code_free);
    if (!regex) fail("cannot compile the pattern ", pattern);
    pcre2_jit_compile(regex.get(), PCRE2_JIT_COMPLETE);  // without a JIT, matching still works
    return regex;
}

// Cuts text at every match: calls found(piece, matches) for the matches and for what is between
// them, from left to right.
void split(const Regex& regex, std::string_view text, auto found) {
    std::shared_ptr<pcre2_match_data> match(pcre2_match_data_create(1, nullptr),
                                            pcre2_match_data_free);
    const size_t* at = pcre2_get_ovector_pointer(match.get());
    for (size_t done = 0; done < text.size(); done = at[1]) {
        // UTF-8 is checked once, at the beginning
        auto options = PCRE2_NOTEMPTY | (done ? PCRE2_NO_UTF_CHECK : 0);
        int rc = pcre2_match(regex.get(), (PCRE2_SPTR)text.data(), text.size(), done, options,
                             match.get(), nullptr);
        if (rc == PCRE2_ERROR_NOMATCH) return found(text.substr(done), false);
        if (rc <= PCRE2_ERROR_UTF8_ERR1 && rc >= PCRE2_ERROR_UTF8_ERR21)
            fail("prompt: invalid UTF-8 at byte ", pcre2_get_startchar(match.get()),
                 "; convert the text to UTF-8 first");
        if (rc < 0) fail("prompt: the tokenizer's pattern gave up at byte ", done);
        if (at[0] > done) found(text.substr(done, at[0] - done), false);
        found(text.substr(at[0], at[1] - at[0]), true);
    }
}

// The last match in text, or "".
inline string find_last(const Regex& regex, std::string_view text) {
    string last;
    split(regex, text, [&](std::string_view piece, bool matches) {
        if (matches) last = piece;
    });
    return last;
}

class Tokenizer {
public:
    int eos = -1;  // from tokenizer_config.json, if it names one

    // Reads folder/tokenizer.json, and refuses by name what it asks for and is not built.
    explicit Tokenizer(const string& folder) {
        // GPT-2 writes each byte as a character: the printable ones of Latin-1 as themselves, the
        // others as the characters from U+0100 on, in their order
        byte_of.fill(-1);
        int next = 0x100;
        for (int b = 0; b < 256; b++) {
            bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
            byte_of[printable ? b : next++] = b;
        }
        with_json(folder + "/tokenizer.json", [&](const json& j) {
            load_vocabulary(j.at("model"));
            for (const char* kind : {"normalizer", "pre_tokenizer", "post_processor"}) {
                json stage = value_or(j, kind, json());
                if (!stage.is_null()) add_stage(kind, stage);
            }
            add_tokens(value_or(j, "added_tokens", json()));
        });
        with_json(folder + "/tokenizer_config.json", [&](const json& j) {
            eos = find(added, token_text(j, "eos_token"));
        }, true);
    }

    // The text of a token in tokenizer_config.json, where it is a string or an object around one.
    static string token_text(const json& config, const char* key) {
        json token = value_or(config, key, json(""));
        return token.is_object() ? token.at("content") : token;
    }

    // text -> ids; invalid UTF-8 is an error with its offset. special: add what the post-processor
    // adds, such as bos. Where the text holds an added token, it becomes that id, special or not.
    vector<int> encode(std::string_view text, bool special = false) const {
        vector<int> ids = special ? prefix : vector<int>();
        split(any_added, text, [&](std::string_view piece, bool matches) {
            if (matches) ids.push_back(find(added, string(piece)));
            else encode_words(piece, ids);
        });
        if (special) ids.insert(ids.end(), suffix.begin(), suffix.end());
        return ids;
    }

    // ids -> text, with U+FFFD for what is not UTF-8.
    string decode(std::span<const int> ids) const {
        string raw, text;
        for (int id : ids) raw += bytes(id);
        utf8_take(raw, text, true);
        return text;
    }

    // The bytes that an id stands for; none if the vocabulary has no such id.
    string bytes(int id) const { return id >= 0 && id < int(tokens.size()) ? tokens[id] : ""; }
    bool is_special(int id) const { return specials.count(id) > 0; }

private:
    std::array<int, 0x200> byte_of;                // character -> byte; -1: it stands for none
    vector<string> tokens;                         // id -> bytes
    std::unordered_map<string, int> vocab;         // bytes -> id
    std::map<string, int, std::greater<>> added;   // text -> id; "ab" stands before "a"
    std::unordered_map<uint64_t, int> ranks;       // pair(left id, right id) -> rank of its merge
    vector<int> merged;                            // rank -> id
    std::set<int> specials;
    Regex any_added = compile("(?!)");
    bool nfc = false;            // normalize text to this form
    vector<Regex> splits;        // cut text into words, one after the other
    vector<int> prefix, suffix;  // what the post-processor adds
    bool ignore_merges = false;  // a word that is in the vocabulary is one id

    static uint64_t pair(int left, int right) { return uint64_t(left) << 32 | uint32_t(right); }

    // map[key], or -1.
    static int find(const auto& map, const auto& key) {
        auto found = map.find(key);
        return found == map.end() ? -1 : found->second;
    }

    // The bytes that GPT-2's characters stand for. A text with any other character stays as it is.
    string from_byte_level(const string& text) const {
        string out;
        for (size_t i = 0; i < text.size();) {
            int code;
            i += utf8proc_iterate((const utf8proc_uint8_t*)&text[i], -1, &code);
            if (code < 0 || code >= int(byte_of.size()) || byte_of[code] < 0) return text;
            out += char(byte_of[code]);
        }
        return out;
    }

    const string& add_token(const string& text, int id) {
        if (id < 0 || id >= kMaxDimension) fail("id ", id, " is out of range");
        if (id >= int(tokens.size())) tokens.resize(id + 1);
        return tokens[id] = from_byte_level(text);
    }

    void load_vocabulary(const json& j) {
        only(j, {{"type", "BPE"}, {"byte_fallback", false}, {"end_of_word_suffix", ""},
                 {"continuing_subword_prefix", ""}});
        ignore_merges = value_or(j, "ignore_merges", false);
        const json &words = j.at("vocab"), &merges = j.at("merges");
        vocab.reserve(words.size());
        ranks.reserve(merges.size());
        for (const auto& [text, id] : words.items()) vocab[add_token(text, id)] = id;
        for (const json& merge : merges) {  // "a b", or ["a", "b"] in newer files
            string text = merge.is_string() ? string(merge)
                                            : string(merge.at(0)) + " " + string(merge.at(1));
            size_t space = text.find(' ');
            string left = from_byte_level(text.substr(0, space));
            string right = from_byte_level(text.substr(space + 1));
            int l = find(vocab, left), r = find(vocab, right), both = find(vocab, left + right);
            if (l < 0 || r < 0 || both < 0) fail("merge of unknown tokens ", merge);
            ranks[pair(l, r)] = int(merged.size());
            merged.push_back(both);
        }
    }

    // What is done before the merges or behind them, of one kind; a Sequence is a list of stages.
    void add_stage(const string& kind, const json& j) {
        static const char* gpt2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+|"
                                  " ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
        string stage = kind + " " + j.at("type").get<string>();
        if (stage == kind + " Sequence") {
            for (const json& list : j) {
                if (!list.is_array()) continue;
                for (const json& one : list) add_stage(kind, one);
            }
        } else if (stage == "normalizer NFC") {
            nfc = true;
        } else if (stage == "pre_tokenizer Split" && j.at("pattern").contains("Regex")) {
            only(j, {{"behavior", "Isolated"}, {"invert", false}});
            splits.push_back(compile(j["pattern"]["Regex"]));
        } else if (stage == "pre_tokenizer Digits") {
            splits.push_back(compile(j.at("individual_digits") ? "\\p{N}" : "\\p{N}+"));
        } else if (stage == "pre_tokenizer ByteLevel") {
            only(j, {{"add_prefix_space", false}});
            if (value_or(j, "use_regex", true)) splits.push_back(compile(gpt2));
        } else if (stage == "post_processor TemplateProcessing") {
            add_template(j);
        } else if (stage != "post_processor ByteLevel") {  // that one only moves offsets
            fail(kind, " ", j, " is not supported, byte-level BPE is");
        }
    }

    // A list of special tokens, and the text ("Sequence") between them.
    void add_template(const json& j) {
        const json& special = j.at("special_tokens");
        vector<int>* side = &prefix;
        for (const json& one : j.at("single")) {
            if (one.contains("Sequence")) {
                side = &suffix;
                continue;
            }
            const json& ids = special.at(one.at("SpecialToken").at("id")).at("ids");
            for (int id : ids) side->push_back(id);
        }
    }

    void add_tokens(const json& list) {
        std::map<string, json> plain{{"single_word", false}, {"lstrip", false}, {"rstrip", false}};
        if (nfc) plain["normalized"] = false;
        for (const json& token : list) {
            string text = token.at("content");
            only(token, plain, text + ": ");
            int id = added[text] = token.at("id");
            add_token(text, id);
            if (value_or(token, "special", false)) specials.insert(id);
        }
        string any;  // a pattern; what could mean something in it stands behind a backslash
        for (const auto& [text, id] : added) {
            any += '|';
            for (char c : text) any += isalnum(c) || (c & 0x80) ? string{c} : string{'\\', c};
        }
        if (!added.empty()) any_added = compile(any.substr(1));
    }

    // Encodes text between added tokens: normalizes it, splits it into words, merges in each word.
    void encode_words(std::string_view raw, vector<int>& ids) const {
        string text(raw);
        if (nfc) {
            // utf8proc sorts n combining marks in n^2 steps
            static const Regex absurd = compile("\\p{M}{256}");
            if (find_last(absurd, raw) != "") fail("prompt: 256 combining marks; remove some");
            utf8proc_uint8_t* form = nullptr;
            const auto options = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
            auto size = utf8proc_map((utf8proc_uint8_t*)raw.data(), raw.size(), &form, options);
            text.assign((char*)form, size);  // size is no error: split has checked the UTF-8
            free(form);
        }
        vector<std::string_view> words = {text};
        for (const Regex& regex : splits)
            for (std::string_view word : std::exchange(words, {}))
                split(regex, word, [&](std::string_view piece, bool) { words.push_back(piece); });
        for (std::string_view word : words) merge(string(word), ids);
    }

    // Joins pairs of neighbouring symbols as long as there is one to join: of those of lowest rank
    // the leftmost. A heap holds the pairs, so a word of n bytes takes O(n log n).
    void merge(const string& word, vector<int>& ids) const {
        int whole = ignore_merges ? find(vocab, word) : -1;
        if (whole >= 0) return ids.push_back(whole);
        vector<int> symbols;
        for (char byte : word) symbols.push_back(find(vocab, string(1, byte)));
        std::erase(symbols, -1);  // a byte without an id is left out, as in Hugging Face
        const int end = int(symbols.size());
        // A joined symbol stands at the first of the places that it takes. size says how many these
        // are, at the first and at the last of them.
        vector<int> size(end, 1);

        std::priority_queue<std::pair<int, int>, vector<std::pair<int, int>>, std::greater<>> heap;
        auto rank_at = [&](int at) {  // of the pair of this symbol and the next; -1: none
            int right = at + size[at];
            return right < end ? find(ranks, pair(symbols[at], symbols[right])) : -1;
        };
        auto push = [&](int at) {
            if (int rank = rank_at(at); rank >= 0) heap.emplace(rank, at);
        };
        for (int i = 0; i < end; i++) push(i);
        while (!heap.empty()) {
            auto [rank, at] = heap.top();
            heap.pop();
            if (rank_at(at) != rank) continue;  // the pair is gone
            int right = at + size[at], both = size[at] + size[right];
            symbols[at] = merged[rank];
            symbols[right] = -1;  // joins nothing
            size[at] = size[at + both - 1] = both;
            push(at);
            if (at > 0) push(at - size[at - 1]);
        }
        for (int i = 0; i < end; i += size[i]) ids.push_back(symbols[i]);
    }
};

// Text that grows id by id. It gives out nothing that could still change: no half character, and no
// beginning of a stop string. It never gives out a stop string itself.
struct TextStream {
    const Tokenizer* tokenizer;  // null gives no text at all
    vector<string> stops;        // none of them empty
    bool stopped = false;        // a stop string has come
    string raw, held;  // bytes of an unfinished character; text that may become a stop string

    TextStream(const Tokenizer* tokenizer, vector<string> stops)
        : tokenizer(tokenizer), stops(std::move(stops)) {}

    // Adds an id (a special one has no text); returns the text that is certain by now.
    string push(int id) {
        if (tokenizer && !tokenizer->is_special(id)) raw += tokenizer->bytes(id);
        return certain(false);
    }
    // Returns the rest of the text: no more ids come.
    string finish() { return certain(true); }

private:
    string certain(bool last) {
        if (!tokenizer || stopped) return "";
        utf8_take(raw, held, last);
        size_t size = held.size();  // of the text before a stop string, or what may become one
        for (const string& stop : stops) size = std::min(size, held.find(stop));
        stopped = size < held.size();
        if (!stopped && !last)
            for (size_t i = 0; i < size; i++)
                for (const string& stop : stops)
                    if (stop.starts_with(std::string_view(held).substr(i))) size = i;
        string out = held.substr(0, size);
        held.erase(0, size);
        return out;
    }
};

// ---------------------------------------------------------------------------------------------
// Chat: the formats of the supported families, which are two. Jinja is not interpreted: the text of
// a template tells which format it writes, and that is written out here.

struct Message {
    string role, content;  // role: system, user or assistant
};

// text without the white space at its ends, as Python's str.strip() has it.
inline string trim(const string& text) {
    static const Regex content = compile("(?s)[^\\s\\x1C-\\x1F](.*[^\\s\\x1C-\\x1F])?");
    return find_last(content, text);
}

struct Chat {
    bool thinking = true;         // Qwen3: false asks for an answer without a thought
    bool llama;                   // Llama 3's format, else ChatML
    bool drops_thoughts;          // an answer's thoughts are left out of later turns
    string bos, default_system;   // what a text begins with; the system message where none is given
    string dates;                 // Llama 3.1 and later: the first lines of the system message
    string begins_with;           // an answer begins with this,
    string no_thought;            // then, without thinking, with this,
    string end_of_turn;           // and ends with this

    // The template is chat_template.jinja, or chat_template in tokenizer_config.json.
    static Chat load(const string& folder) {
        need_folder(folder);
        string text, bos, jinja = folder + "/chat_template.jinja";
        with_json(folder + "/tokenizer_config.json", [&](const json& j) {
            bos = Tokenizer::token_text(j, "bos_token");
            json list = value_or(j, "chat_template", json(""));  // a text, or several with names
            if (list.is_string()) list = {{{"name", "default"}, {"template", list}}};
            for (const json& one : list)
                if (one.at("name") == "default") text = one.at("template");
        }, true);
        if (std::filesystem::exists(jinja)) text = read_file(jinja);
        if (text.empty()) fail(folder, ": no chat template; use nanocu generate");
        return Chat(text, bos);
    }

    Chat(const string& jinja, const string& bos_token) {
        auto has = [&](const char* words) { return jinja.find(words) != string::npos; };
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
            string date = find_last(compile("(?<=date_string = \")[^\"]+"), jinja);
            if (has("strftime_now")) date = str(std::put_time(localtime(&now), "%d %b %Y"));
            dates = "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n";
        }
        // a ChatML template holds its default system text; a newline may be written in it as \n
        Regex system = compile("<\\|im_start\\|>system(\n|\\\\n)\\K[^'\"{}]+(?=<\\|im_end\\|>)");
        if (!llama) default_system = find_last(system, jinja);
    }

    // All messages, and the beginning of an answer to the last, which has to be the user's.
    string render(const vector<Message>& messages) const {
        if (messages.empty() || messages.back().role != "user")
            fail("chat: the last message must be the user's");
        bool system = messages[0].role == "system";
        string text = opening(system ? &messages[0].content : nullptr);
        for (size_t i = system; i + 1 < messages.size(); i++) {
            const auto& [role, content] = messages[i];
            if (role != "assistant" && role != "user" && role != "system")
                fail("chat: role ", role, " is not supported; system, user and assistant are");
            text += turn(role, content);
        }
        return text + user_turn(messages.back().content);
    }

    // A rendering is an opening, turns, and the user's turn. A conversation grows by the last of
    // them. system may be null.
    string opening(const string* system) const {
        string text = system ? *system : default_system;
        if (!dates.empty()) return bos + header("system") + dates + trim(text) + end_of_turn;
        return system || !text.empty() ? bos + turn("system", text) : bos;
    }
    string user_turn(const string& text) const {
        string answer = header("assistant") + begins_with + (thinking ? "" : no_thought);
        return turn("user", text) + answer;
    }

    string header(const string& role) const {
        if (llama) return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
        return "<|im_start|>" + role + "\n";
    }
    string turn(const string& role, string content) const {
        size_t end = content.rfind("</think>");
        if (role == "assistant" && drops_thoughts && end != string::npos)
            content.erase(0, content.find_first_not_of('\n', end + 8));
        return header(role) + (llama ? trim(content) : content) + end_of_turn;
    }
};

// ---------------------------------------------------------------------------------------------
// Weights: the tensors of *.safetensors by name. Such a file holds the length of its header (64
// bits, little-endian), the header in JSON, and the data. What the header says is checked before it
// is used.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define NANOCU_BOTH __host__ __device__  // the same code for a CPU and a GPU
#else
#define NANOCU_BOTH
#endif

// The upper half of a float.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    NANOCU_BOTH explicit bf16(float f) {  // to the nearest, ties to even
#ifdef __CUDA_ARCH__
        bits = __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
        uint32_t all = std::bit_cast<uint32_t>(f);
        bits = std::isnan(f) ? 0x7FC0 : uint16_t((all + 0x7FFF + (all >> 16 & 1)) >> 16);
#endif
    }
    NANOCU_BOTH operator float() const {
        uint32_t all = uint32_t(bits) << 16;
        float f;
        memcpy(&f, &all, sizeof f);
        return f;
    }
};

inline float f16_to_float(uint16_t half) {
    uint32_t sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = (exponent + 112) << 23 | fraction << 13;  // 112: from bias 15 to bias 127
    if (exponent == 0) bits = std::bit_cast<uint32_t>(float(fraction) * 0x1p-24f);  // subnormal
    if (exponent == 31) bits = 0x7F800000 | fraction << 13;                         // inf, NaN
    return std::bit_cast<float>(sign << 31 | bits);
}

// [rows, cols], bf16, row-major.
struct Matrix {
    const bf16* data = nullptr;
    int rows = 0, cols = 0;
    const bf16* row(int i) const { return data + size_t(i) * cols; }
};

class Weights {
public:
    uint64_t bytes = 0;  // of all tensors that were asked for, as bf16
    string rounded;      // the dtype that was rounded to bf16; empty: none was

    // Maps folder/model.safetensors, or the files that its index names. dummy: maps nothing; every
    // tensor is made of random numbers.
    Weights(const string& folder, bool dummy) : folder(folder), dummy(dummy) {
        if (dummy) return;
        std::set<string> files = {"model.safetensors"};
        if (!std::filesystem::exists(folder + "/model.safetensors"))
            with_json(folder + "/model.safetensors.index.json", [&](const json& j) {
                files.clear();
                for (const json& name : j.at("weight_map")) files.insert(name.get<string>());
            }, true);
        for (const string& file : files) in_file(folder + "/" + file, [&] { map_file(file); });
    }

    // The tensor of this name and shape, in the mapped file if that holds bf16, else rounded in
    // memory of our own; for as long as this object lives.
    Matrix get(const string& name, int rows, int cols) {
        return {find(name, {rows, cols}, uint64_t(rows) * cols), rows, cols};
    }

    vector<float> get(const string& name, int n) {
        vector<float> out(n);
        std::ranges::copy(std::span(find(name, {n}, n), n), out.begin());
        return out;
    }

private:
    const bf16* find(const string& name, const json& shape, uint64_t count) {
        bytes += count * sizeof(bf16);
        if (dummy) return make_up(count, name.ends_with("norm.weight"));
        if (!tensors.count(name)) fail(folder, ": no tensor ", name, "; is a file missing?");
        const auto& [info, data] = tensors.at(name);
        if (info["shape"] != shape)
            fail(folder, ": ", name, " is ", info["shape"], ", but config.json asks for ", shape);
        string dtype = info["dtype"];
        if (dtype == "BF16" && uintptr_t(data) % alignof(bf16) == 0) return (const bf16*)data;
        if (dtype != "BF16") rounded = dtype;
        bool wide = dtype == "F32", half = dtype == "F16";
        return own(count, [=, data = data](uint64_t i) {
            uint32_t bits = 0;
            memcpy(&bits, data + i * (wide ? 4 : 2), wide ? 4 : 2);  // from any address
            if (wide) return std::bit_cast<float>(bits);
            return half ? f16_to_float(bits) : std::bit_cast<float>(bits << 16);
        });
    }

    // Ones for norms, else random numbers, uniform with deviation 0.02; the same in every run.
    const bf16* make_up(uint64_t count, bool ones) {
        uint64_t seed = memory.size() << 40;
        return own(count, [=](uint64_t i) {
            uint64_t z = (seed + i) * 0x9E3779B97F4A7C15;  // as in splitmix64 (Steele et al. 2014)
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
            return ones ? 1 : 0.0346f * float(int32_t(z >> 32)) / 0x1p31f;
        });
    }

    // Makes memory of our own that holds value(0), value(1), ..., rounded to bf16.
    const bf16* own(uint64_t count, auto value) {
        bf16* out = new bf16[count];
        memory.emplace_back(out, std::default_delete<bf16[]>());
        #pragma omp parallel for
        for (uint64_t i = 0; i < count; i++) out[i] = bf16(float(value(i)));
        return out;
    }

    // The caller, by in_file, puts the file's path before an error.
    void map_file(const string& file) {
        string path = folder + "/" + file;
        if (file.find('/') != string::npos || !std::filesystem::is_regular_file(path))
            fail("missing; download the whole model, or use --load-format dummy");
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        uint64_t size = std::filesystem::file_size(path), length;
        void* map = size < 8 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
        close(fd);
        if (map == MAP_FAILED) fail("cannot be mapped; cut short? download it again");
        memory.emplace_back(map, [size](void* begin) { munmap(begin, size); });
        madvise(map, size, MADV_WILLNEED);
        memcpy(&length, map, 8);
        if (length > std::min<uint64_t>(size - 8, 100'000'000))  // the reference loader's limit
            fail("a header of ", length, " bytes is too long; download it again");
        const char* text = (const char*)map + 8;
        read_header({text, length}, {text + length, size - 8 - length});
    }

    // Checks that the tensors fill data: none overlap, and nothing is left between or behind them.
    void read_header(std::string_view text, std::string_view data) {
        size_t names = 0;  // with equal ones, of which the parser keeps only the last
        json header = parse_json(text, &names);
        if (names != header.size()) fail("two tensors of the same name; download it again");
        header.erase("__metadata__");
        auto number = [](const json& n) { return n.is_number_unsigned() ? n.get<uint64_t>() : -1; };
        std::set<std::tuple<uint64_t, uint64_t, string>> ranges;
        for (const auto& [name, t] : header.items()) {
            string dtype = t.at("dtype");
            uint64_t need = dtype == "F32" ? 4 : dtype == "F16" || dtype == "BF16" ? 2 : 0;
            if (!need) fail(name, " is ", dtype, "; supported are BF16, F16, F32");
            for (const json& n : t.at("shape"))
                if (__builtin_mul_overflow(need, number(n), &need)) need = UINT64_MAX - 1;
            const json& offsets = t.at("data_offsets");
            uint64_t begin = number(offsets.at(0)), end = number(offsets.at(1));
            if (begin > end || end > data.size() || end - begin != need)
                fail(name, " does not fit its offsets or the file; download it again");
            ranges.insert({begin, end, name});
            if (!tensors.try_emplace(name, t, data.data() + begin).second)
                fail(name, " is in two files");
        }
        ranges.insert({data.size(), data.size(), "the end"});
        uint64_t filled = 0;
        for (const auto& [begin, end, name] : ranges) {
            if (begin != filled) fail("overlap or unused bytes before ", name, "; download again");
            filled = end;
        }
    }

    string folder;
    bool dummy;
    std::map<string, std::pair<json, const char*>> tensors;  // name -> its header, its data
    vector<std::shared_ptr<void>> memory;                    // mapped files, and our own
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
            Layer& l = layers.emplace_back();
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
                vector<float> bias(name[0] == 'q' ? c.q_dim() : c.kv_dim());
                if (c.type == "qwen2") bias = weights.get(attn + name, int(bias.size()));
                l.bias.insert(l.bias.end(), bias.begin(), bias.end());
            }
            if (c.type != "qwen3") continue;
            l.q_norm = weights.get(attn + "q_norm.weight", c.head_dim);
            l.k_norm = weights.get(attn + "k_norm.weight", c.head_dim);
        }
    }
};
