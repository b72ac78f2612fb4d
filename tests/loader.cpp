// Whatever a model folder may hold: what is wrong with it is one line that names it, and what is only
// unusual loads.
#include "common.hpp"

#include <immintrin.h>

namespace {

// A safetensors file with this header.
std::string safetensors(const std::string& header, const std::string& data) {
    uint64_t length = header.size();
    return std::string((const char*)&length, 8) + header + data;
}

struct TensorFile {
    json header;
    std::string data;
};

TensorFile read_tensors(const std::string& path) {
    std::string file = read_file(path);
    uint64_t length;
    memcpy(&length, file.data(), 8);
    return {json::parse(file.substr(8, length)), file.substr(8 + length)};
}

// A tiny model's folder, with patch merged into its config.json (null takes a key away).
void write_config(const TempFolder& folder, const std::string& model, const json& patch = json::object()) {
    json config = golden("models/" + model + "/config.json");
    config.merge_patch(patch);
    folder.write("config.json", config.dump());
}

std::string config_error(const std::string& model, const json& patch) {
    TempFolder folder;
    write_config(folder, model, patch);
    return error_of([&] { load_config(folder.path); });
}

// One line that holds all that it should say.
void check_says(const std::string& error, const std::vector<std::string>& expected) {
    CAPTURE(error);
    CHECK(error.find('\n') == std::string::npos);
    for (const std::string& text : expected) {
        CAPTURE(text);
        CHECK(error.find(text) != std::string::npos);
    }
}

// Greedy ids with the log-probability of each: equal if and only if the logits are.
std::vector<std::pair<int, double>> continued(const std::string& folder) {
    Model m(folder);
    Engine e(m, {});
    Request r = greedy({1, 2, 3, 4, 5}, 12);
    r.logprobs = 0;
    std::vector<std::pair<int, double>> out;
    for (const TokenLogprob& t : run_one(e, r).logprobs) out.push_back({t.id, t.logprob});
    return out;
}

// A copy of a tiny model's tensors in another dtype; convert appends one number to out.
template <class F>
TensorFile in_dtype(const TensorFile& from, const char* dtype, F convert) {
    TensorFile to;
    for (const auto& [name, t] : from.header.items()) {
        if (name == "__metadata__") continue;
        size_t begin = to.data.size();
        for (size_t i = t["data_offsets"][0]; i < t["data_offsets"][1]; i += 2) {
            bf16 number;
            memcpy(&number, &from.data[i], 2);
            convert(bf16_to_float(number), to.data);
        }
        to.header[name] = {{"dtype", dtype}, {"shape", t["shape"]},
                           {"data_offsets", {begin, to.data.size()}}};
    }
    return to;
}

// The character that stands for a byte in tokenizer.json, as GPT-2's bytes_to_unicode has it.
std::string byte_character(unsigned char byte) {
    auto printable = [](int b) { return (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD); };
    int code = byte;
    if (!printable(byte)) {
        code = 0x100;
        for (int b = 0; b < byte; b++) code += !printable(b);
    }
    if (code < 0x80) return std::string(1, char(code));
    return {char(0xC0 | code >> 6), char(0x80 | (code & 0x3F))};
}

// A tokenizer.json: each byte is an id, 256 and on are the merges' results. All of them may be merged
// across anything, since nothing splits the text.
json tiny_tokenizer(const std::vector<std::string>& merges = {}) {
    json vocab = json::object();
    for (int b = 0; b < 256; b++) vocab[byte_character(b)] = b;
    for (std::string merge : merges) {
        merge.erase(merge.find(' '), 1);
        vocab[merge] = vocab.size();
    }
    json plain = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    return {{"added_tokens", json::array()}, {"normalizer", nullptr}, {"pre_tokenizer", plain},
            {"post_processor", nullptr},
            {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
}

Tokenizer load_tokenizer(const json& j) {
    TempFolder folder;
    folder.write("tokenizer.json", j.dump());
    return Tokenizer(folder.path);
}

json added_token(int id, const std::string& content) {
    return {{"id", id}, {"content", content}, {"special", true}, {"normalized", false}};
}

json split(const json& pattern, const char* behavior, bool invert = false) {
    return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}

using Ids = std::vector<int>;

}  // namespace

TEST_CASE("a folder without what it needs is refused") {
    TempFolder folder;
    check_says(error_of([&] { Model m(folder / "nowhere"); }), {"nowhere", "no such folder"});
    check_says(error_of([&] { Model m(folder.path); }), {"config.json"});
    check_says(error_of([&] { Tokenizer t(folder.path); }), {"tokenizer.json"});
    write_config(folder, "qwen2");
    check_says(error_of([&] { Model m(folder.path); }), {"model.safetensors", "missing"});
}

TEST_CASE("a config.json that asks for what is not built is refused by name") {
    struct Case {
        std::string model, patch, says;
    };
    for (const Case& c : std::vector<Case>{
             {"llama3", R"({"architectures": ["GPT2LMHeadModel"]})", "GPT2LMHeadModel"},
             {"llama3", R"({"architectures": ["MixtralForCausalLM"]})", "MixtralForCausalLM"},
             {"llama3", R"({"architectures": null})", "architectures"},
             {"llama3", R"({"architectures": []})", "config.json"},
             {"llama3", R"({"hidden_act": "gelu"})", "hidden_act"},
             {"llama3", R"({"attention_bias": true})", "attention_bias"},
             {"qwen3", R"({"attention_bias": true})", "attention_bias"},
             {"llama3", R"({"mlp_bias": true})", "mlp_bias"},
             {"llama3", R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor"},
             {"llama3", R"({"quantization_config": {"quant_method": "fp8"}})", "quantization_config"},
             {"llama3", R"({"architectures": ["MistralForCausalLM"], "sliding_window": 4096})", "sliding_window"},
             {"qwen2", R"({"use_sliding_window": true, "sliding_window": 4096})", "use_sliding_window"},
             {"qwen3", R"({"use_sliding_window": true, "sliding_window": 4096})", "use_sliding_window"},
             {"qwen3", R"({"layer_types": ["full_attention", "sliding_attention"]})", "sliding_attention"},
             {"llama3", R"({"rope_parameters": {"rope_type": "yarn"}})", "yarn"},
             {"qwen2", R"({"rope_parameters": null, "rope_scaling": {"type": "yarn", "factor": 4}})", "yarn"},
             {"qwen2", R"({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 4}})", "linear"}}) {
        CAPTURE(c.patch);
        check_says(config_error(c.model, json::parse(c.patch)), {"config.json", c.says});
    }
}

TEST_CASE("a config.json with sizes that make no sense is refused") {
    struct Case {
        std::string patch, says;
    };
    for (const Case& c : std::vector<Case>{
             {R"({"vocab_size": 0})", "vocab_size"},
             {R"({"vocab_size": null})", "vocab_size"},
             {R"({"vocab_size": 1e12})", "vocab_size"},
             {R"({"vocab_size": 1e300})", "vocab_size"},
             {R"({"hidden_size": -128})", "hidden_size"},
             {R"({"hidden_size": 9223372036854775808})", "hidden_size"},
             {R"({"intermediate_size": 0})", "intermediate_size"},
             {R"({"num_hidden_layers": 1000000000000})", "num_hidden_layers"},
             {R"({"num_hidden_layers": 0})", "num_hidden_layers"},
             {R"({"num_attention_heads": "four"})", ""},
             {R"({"num_attention_heads": [4]})", ""},
             {R"({"num_attention_heads": 0})", "num_attention_heads"},
             {R"({"num_key_value_heads": -1})", "num_key_value_heads"},
             {R"({"num_key_value_heads": 3})", "heads"},
             {R"({"head_dim": 0})", "head_dim"},
             {R"({"head_dim": 60})", "16"},
             {R"({"head_dim": 4096, "num_attention_heads": 1048576})", "head"},  // their product is 2^32
             {R"({"max_position_embeddings": 0})", "max_position_embeddings"},
             {R"({"rope_parameters": "llama3"})", ""},
             {R"({"rope_parameters": {"factor": null}})", "factor"},
             {R"({"eos_token_id": "two"})", ""},
             {R"({"eos_token_id": [2, null]})", ""}}) {
        CAPTURE(c.patch);
        check_says(config_error("llama3", json::parse(c.patch)), {"config.json", c.says});
    }
}

TEST_CASE("broken JSON is refused with the name of its file, whichever it is") {
    struct Case {
        const char* file;
        std::function<void(const std::string&)> load;
    };
    auto load_chat = [](const std::string& folder) { Chat::load(folder); };
    for (const Case& c : std::vector<Case>{
             {"config.json", [](const std::string& folder) { load_config(folder); }},
             {"generation_config.json", [](const std::string& folder) { load_config(folder); }},
             {"tokenizer.json", [](const std::string& folder) { Tokenizer t(folder); }},
             {"tokenizer_config.json", load_chat},
             {"model.safetensors.index.json", [](const std::string& folder) { Model m(folder); }}})
        for (std::string text : {"", "{", "{\"a\": 1} x", "[1, 2", "<html>\n<body>", "{\"a\": \"\xFF\"}"}) {
            TempFolder folder;
            write_config(folder, "qwen2");
            folder.write(c.file, text);
            CAPTURE(text);
            check_says(error_of([&] { c.load(folder.path); }), {c.file});
        }
}

TEST_CASE("a safetensors file that is cut short or claims too much is refused") {
    const std::string whole = read_file(kData + "models/qwen2/model.safetensors");
    auto with_length = [&](uint64_t length) { return std::string((const char*)&length, 8) + whole.substr(8); };
    for (const std::string& file : std::vector<std::string>{
             "", whole.substr(0, 7), whole.substr(0, 8), whole.substr(0, 1000), whole.substr(0, 5000),
             whole.substr(0, whole.size() - 1), whole + "x", with_length(0), with_length(whole.size()),
             with_length(uint64_t(1) << 60), with_length(~uint64_t(0)), with_length(~uint64_t(0) - 7),
             "version https://git-lfs.github.com/spec/v1\n"}) {
        TempFolder folder;
        write_config(folder, "qwen2");
        folder.write("model.safetensors", file);
        CAPTURE(file.size());
        check_says(error_of([&] { Model m(folder.path); }), {"model.safetensors"});
    }
}

TEST_CASE("a safetensors header that does not describe its data is refused") {
    struct Case {
        std::string header, says;
    };
    const std::string a = R"("a": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]})";
    for (const Case& c : std::vector<Case>{  // % stands for a good tensor a; the data has 32 bytes
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]})", ""},  // no closing }
             {R"([%])", ""},
             {R"([1, 2])", ""},
             {R"(null)", ""},
             {R"({%, "b": 5})", ""},
             {R"({%, "b": {"dtype": "F32", "shape": [4]}})", ""},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16]}})", ""},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 33]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 1e30]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [18446744073709551600, 0]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 16]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16.5, 32]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}})", "b"},         // overlap
             {R"({%, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})", ""},          // the same
             {R"({%, "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}})", "b"},        // a hole
             {R"({%, "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}})", "behind"},  // a rest
             {R"({%})", "behind"},
             {R"({%, "b": {"dtype": "F32", "shape": [5], "data_offsets": [16, 32]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 32]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": ["4"], "data_offsets": [16, 32]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [16, 32]}})", "b"},
             {R"({%, "b": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [16, 20]}})", "b"},
             {R"({%, "b": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]}})", "I64"},
             {R"({%, "b": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [16, 32]}})", "F8_E4M3"},
             {R"({%, "b": {"dtype": 7, "shape": [16], "data_offsets": [16, 32]}})", ""},
             {R"({%, "a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}})", "a"}}) {  // twice
        TempFolder folder;
        std::string header = c.header;
        if (size_t at = header.find('%'); at != std::string::npos) header.replace(at, 1, a);
        folder.write("model.safetensors", safetensors(header, std::string(32, 'x')));
        CAPTURE(header);
        check_says(error_of([&] { Weights w(folder.path, false); }), {"model.safetensors", c.says});
    }
}

TEST_CASE("weights that are not the config's are refused with what was expected and found") {
    auto error = [](const char* model, const char* config, auto change) {
        TempFolder folder;
        write_config(folder, model, json::parse(config));
        TensorFile t = read_tensors(kData + "models/" + model + "/model.safetensors");
        change(t.header);
        folder.write("model.safetensors", safetensors(t.header.dump(), t.data));
        return error_of([&] { Model m(folder.path); });
    };
    auto none = [](json&) {};
    check_says(error("qwen2", R"({"intermediate_size": 336})", none), {"gate_proj", "[320,128]", "[336,128]"});
    check_says(error("qwen2", R"({"vocab_size": 511})", none), {"model.embed_tokens.weight", "[512,128]", "[511,128]"});
    check_says(error("qwen2", R"({"num_hidden_layers": 4})", none), {"model.layers.3.", "missing"});
    check_says(error("qwen2", R"({"tie_word_embeddings": false})", none), {"lm_head.weight", "missing"});
    check_says(error("qwen3", "{}", [](json& header) {
        header["other"] = header["model.norm.weight"];
        header.erase("model.norm.weight");
    }), {"model.norm.weight", "missing"});
    check_says(error("qwen3", "{}", [](json& header) {
        json& shape = header["model.layers.1.mlp.down_proj.weight"]["shape"];
        shape = {shape[1], shape[0]};
    }), {"model.layers.1.mlp.down_proj.weight", "[128,320]", "[320,128]"});
    check_says(error("qwen3", "{}", [](json& header) {
        json& shape = header["model.norm.weight"]["shape"];
        shape = {shape[0], 1};
    }), {"model.norm.weight", "[128]", "[128,1]"});
}

TEST_CASE("an index whose shards are missing, elsewhere or not named is refused") {
    const std::string tiny = kData + "models/llama3/", index = "model.safetensors.index.json";
    TempFolder folder;
    write_config(folder, "llama3");
    auto error = [&](const json& j) {
        folder.write(index, j.dump());
        return error_of([&] { Model m(folder.path); });
    };
    json good = json::parse(read_file(tiny + index));
    for (int i = 1; i <= 6; i++) {
        std::string shard = str("model-0000", i, "-of-00006.safetensors");
        check_says(error(good), {shard, "missing"});
        folder.write(shard, read_file(tiny + shard));
    }
    CHECK(error(good) == "");
    json away = good;
    away["weight_map"]["lm_head.weight"] = "../llama3/model-00006-of-00006.safetensors";
    check_says(error(away), {"../llama3"});
    away["weight_map"]["lm_head.weight"] = "..";
    check_says(error(away), {".."});
    away["weight_map"]["lm_head.weight"] = 6;
    check_says(error(away), {index});
    check_says(error({{"weight_map", "all"}}), {""});
    check_says(error(json::object()), {index, "weight_map"});
    // a tensor that stands in two files
    folder.write("more.safetensors", read_file(folder / "model-00006-of-00006.safetensors"));
    good["weight_map"]["other"] = "more.safetensors";
    check_says(error(good), {".safetensors", "lm_head.weight"});
}

TEST_CASE("a file of odd form gives the same logits: header's length, spaces, order, metadata, shards") {
    const std::string tiny = kData + "models/qwen2";
    const auto expected = continued(tiny);
    REQUIRE(expected.size() == 12);
    TensorFile t = read_tensors(tiny + "/model.safetensors");
    std::string header = t.header.dump();
    header += std::string((8 - header.size() % 8) % 8, ' ');  // now its data is aligned
    TempFolder folder;
    write_config(folder, "qwen2");
    for (const std::string& form : {header + " ", "   " + header, "\n" + header, header + std::string(4097, ' ')}) {
        folder.write("model.safetensors", safetensors(form, t.data));
        CHECK(continued(folder.path) == expected);
    }
    t.header["__metadata__"] = {{"format", "pt"}, {"of", "lm_head.weight"}};
    folder.write("model.safetensors", safetensors(t.header.dump(1), t.data));
    CHECK(continued(folder.path) == expected);
    t.header.erase("__metadata__");
    t.header["empty"] = {{"dtype", "F32"}, {"shape", {0, 7}}, {"data_offsets", {0, 0}}};
    folder.write("model.safetensors", safetensors(t.header.dump(), t.data));
    CHECK(continued(folder.path) == expected);

    TempFolder merged;  // the six shards in one file
    write_config(merged, "llama3");
    TensorFile all;
    for (int i = 1; i <= 6; i++) {
        TensorFile shard = read_tensors(str(kData, "models/llama3/model-0000", i, "-of-00006.safetensors"));
        for (auto& [name, one] : shard.header.items()) {
            if (name == "__metadata__") continue;
            for (json& offset : one["data_offsets"]) offset = offset.get<size_t>() + all.data.size();
            all.header[name] = one;
        }
        all.data += shard.data;
    }
    merged.write("model.safetensors", safetensors(all.header.dump(), all.data));
    CHECK(continued(merged.path) == continued(kData + "models/llama3"));
}

TEST_CASE("F32 and F16 weights are rounded to bf16, which is said") {
    const std::string tiny = kData + "models/qwen3";
    const auto expected = continued(tiny);
    TensorFile t = read_tensors(tiny + "/model.safetensors");
    TempFolder folder;
    write_config(folder, "qwen3");
    CHECK(Model(tiny).weights.rounded == "");

    auto as_f32 = [](float f, std::string& out) { out.append((const char*)&f, 4); };
    TensorFile f32 = in_dtype(t, "F32", as_f32);
    for (const char* space : {"", " "}) {  // one of them is not aligned
        folder.write("model.safetensors", safetensors(f32.header.dump() + space, f32.data));
        CHECK(continued(folder.path) == expected);
        CHECK(Model(folder.path).weights.rounded == "F32");
    }
    // what lies between two bf16 goes to the nearer one, halves to the even one
    auto nudged = [&](float f, std::string& out) {
        uint32_t bits = std::bit_cast<uint32_t>(f);
        as_f32(std::bit_cast<float>(bits & 0x10000 ? bits + 0x7FFF : bits + 0x8000), out);
    };
    f32 = in_dtype(t, "F32", nudged);
    folder.write("model.safetensors", safetensors(f32.header.dump(), f32.data));
    CHECK(continued(folder.path) == expected);

    TensorFile f16 = in_dtype(t, "F16", [](float f, std::string& out) {  // exact down to 2^-17
        uint16_t half = _cvtss_sh(f, 0);
        out.append((const char*)&half, 2);
    });
    folder.write("model.safetensors", safetensors(f16.header.dump(), f16.data));
    auto found = continued(folder.path);
    CHECK(Model(folder.path).weights.rounded == "F16");
    for (size_t i = 0; i < expected.size(); i++) {
        CHECK(found[i].first == expected[i].first);
        CHECK(found[i].second == doctest::Approx(expected[i].second).epsilon(1e-3));
    }
}

TEST_CASE("conversions to and from bf16 and f16 are those of the hardware") {
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = f16_to_float(uint16_t(h)), expected = _cvtsh_ss(uint16_t(h));
        CHECK_UNARY(std::isnan(expected) ? std::isnan(f) : f == expected && std::signbit(f) == std::signbit(expected));
        CHECK_UNARY(std::isnan(bf16_to_float(bf16(h))) || float_to_bf16(bf16_to_float(bf16(h))) == h);
    }
    struct Case {
        uint32_t bits;
        bf16 rounded;
    };
    for (const Case& c : std::vector<Case>{
             {0x3F807FFF, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F808001, 0x3F81}, {0x3F818000, 0x3F82},
             {0x3F817FFF, 0x3F81}, {0xBF808000, 0xBF80}, {0x7F7FFFFF, 0x7F80}, {0x00008000, 0x0000}})
        CHECK(float_to_bf16(std::bit_cast<float>(c.bits)) == c.rounded);
    CHECK(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7F800001u)))));
}

TEST_CASE("a tied model ignores an lm_head in its file, and tensors that nobody asks for") {
    const std::string tiny = kData + "models/qwen2";
    TensorFile t = read_tensors(tiny + "/model.safetensors");
    size_t begin = t.data.size();
    t.data += std::string(2 * 512 * 128 + 8, 'x');
    t.header["lm_head.weight"] = {{"dtype", "BF16"}, {"shape", {512, 128}},
                                  {"data_offsets", {begin, begin + 2 * 512 * 128}}};
    t.header["unasked"] = {{"dtype", "F32"}, {"shape", {1, 2, 1}},
                           {"data_offsets", {begin + 2 * 512 * 128, t.data.size()}}};
    TempFolder folder;
    write_config(folder, "qwen2");
    folder.write("model.safetensors", safetensors(t.header.dump(), t.data));
    CHECK(continued(folder.path) == continued(tiny));
    // without the tie the same file's lm_head counts
    write_config(folder, "qwen2", {{"tie_word_embeddings", false}});
    CHECK(continued(folder.path) != continued(tiny));
}

TEST_CASE("ids that end a text are the union of config.json's and generation_config.json's") {
    struct Case {
        std::string config, generation;
        std::set<int> eos;
    };
    for (const Case& c : std::vector<Case>{{"null", "{}", {}},
                                           {"7", "{}", {7}},
                                           {"[7, 8]", "{}", {7, 8}},
                                           {"null", R"({"eos_token_id": 9})", {9}},
                                           {"7", R"({"eos_token_id": [9, 7, 10]})", {7, 9, 10}},
                                           {"7", R"({"eos_token_id": null})", {7}}}) {
        TempFolder folder;
        write_config(folder, "llama3", {{"eos_token_id", json::parse(c.config)}});
        folder.write("generation_config.json", c.generation);
        CHECK(load_config(folder.path).eos == c.eos);
    }
}

TEST_CASE("configs of transformers 4 and 5 mean the same") {
    auto inv_freq = [](const char* model, const char* patch) {
        TempFolder folder;
        write_config(folder, model, json::parse(patch));
        return load_config(folder.path).inv_freq;
    };
    std::vector<float> scaled = inv_freq("llama3", "{}");
    CHECK(scaled == inv_freq("llama3", R"({"rope_parameters": null, "rope_theta": 500000.0, "rope_scaling":
        {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
         "rope_type": "llama3"}})"));
    std::vector<float> plain = inv_freq("llama3", R"({"rope_parameters": null, "rope_theta": 500000})");
    CHECK(plain == inv_freq("llama3", R"({"rope_parameters": null, "rope_theta": 5e5, "rope_scaling": null})"));
    CHECK(plain == inv_freq("llama3", R"({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5,
        "factor": null, "high_freq_factor": null, "low_freq_factor": null,
        "original_max_position_embeddings": null}})"));
    REQUIRE(plain.size() == 32);
    for (int i = 0; i < 32; i++) CHECK(plain[i] == doctest::Approx(std::pow(5e5, -i / 32.0)).epsilon(1e-6));
    CHECK(scaled[0] == plain[0]);
    CHECK(scaled[31] == plain[31] / 8);
    CHECK(inv_freq("qwen2", R"({"rope_parameters": null, "rope_theta": 1000000})") == inv_freq("qwen2", "{}"));
    CHECK(inv_freq("qwen2", R"({"rope_parameters": null})")[1] ==
          doctest::Approx(std::pow(1e4, -1 / 32.0)));  // transformers' default
}

TEST_CASE("sampling defaults follow generation_config.json") {
    struct Case {
        std::string generation;
        float temperature, top_k, top_p, min_p, repetition_penalty;
    };
    for (const Case& c : std::vector<Case>{
             {R"({})", 0, 0, 1, 0, 1},
             {R"({"do_sample": false})", 0, 0, 1, 0, 1},
             {R"({"do_sample": null, "temperature": null, "top_k": null, "top_p": null})", 0, 0, 1, 0, 1},
             {R"({"do_sample": false, "temperature": 0.6})", 0, 0, 1, 0, 1},
             {R"({"do_sample": true})", 1, 0, 1, 0, 1},
             {R"({"temperature": 0.6})", 0.6f, 0, 1, 0, 1},
             {R"({"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05})",
              0.7f, 20, 0.8f, 0, 1.05f},
             {R"({"do_sample": true, "temperature": 0.3, "min_p": 0.15})", 0.3f, 0, 1, 0.15f, 1}}) {
        TempFolder folder;
        write_config(folder, "qwen3");
        folder.write("generation_config.json", c.generation);
        Config config = load_config(folder.path);
        CAPTURE(c.generation);
        CHECK(config.temperature == c.temperature);
        CHECK(config.top_k == c.top_k);
        CHECK(config.top_p == c.top_p);
        CHECK(config.min_p == c.min_p);
        CHECK(config.repetition_penalty == c.repetition_penalty);
    }
}

TEST_CASE("a tokenizer.json that asks for what is not built is refused by name") {
    struct Case {
        std::string patch, says;
    };
    for (const Case& c : std::vector<Case>{
             {R"({"model": {"type": "Unigram"}})", "Unigram"},
             {R"({"model": {"type": "WordPiece"}})", "WordPiece"},
             {R"({"model": {"byte_fallback": true}})", "byte_fallback"},
             {R"({"model": {"end_of_word_suffix": "</w>"}})", "end_of_word_suffix"},
             {R"({"model": {"continuing_subword_prefix": "##"}})", "continuing_subword_prefix"},
             {R"({"model": null})", "model"},
             {R"({"model": {"vocab": null}})", "vocab"},
             {R"({"model": {"vocab": {"a": -1}}})", "-1"},
             {R"({"model": {"vocab": {"a": 2000000000}}})", "2000000000"},
             {R"({"model": {"merges": ["a zz"]}})", "a zz"},
             {R"({"model": {"merges": ["ab"]}})", "ab"},
             {R"({"model": {"merges": [["a", "zz"]]}})", "zz"},
             {R"({"model": {"merges": [["a"]]}})", ""},
             {R"({"model": {"merges": [7]}})", ""},
             {R"({"normalizer": {"type": "Lowercase"}})", "Lowercase"},
             {R"({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}]}})", "Replace"},
             {R"({"pre_tokenizer": {"type": "Metaspace"}})", "Metaspace"},
             {R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}})", "Whitespace"},
             {R"({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true}})", "add_prefix_space"},
             {R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "MergedWithPrevious"}})",
              "MergedWithPrevious"},
             {R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"}})", "Removed"},
             {R"({"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated"}})", "String"},
             {R"({"normalizer": {"type": "NFKC"}})", "NFKC"},
             {R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated"}})", "(a"},
             {R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\C"}, "behavior": "Isolated"}})",
              "\\C"},  // half a character
             {R"({"post_processor": {"type": "RobertaProcessing"}})", "RobertaProcessing"},
             {R"({"post_processor": {"type": "Sequence", "processors": [{"type": "BertProcessing"}]}})",
              "BertProcessing"},
             {R"({"added_tokens": [{"id": 256, "content": "<x>", "lstrip": true}]})", "<x>"},
             {R"({"added_tokens": [{"id": 256, "content": "<x>", "single_word": true}]})", "<x>"},
             {R"({"added_tokens": [{"content": "<x>"}]})", "id"}}) {
        json j = tiny_tokenizer();
        j.merge_patch(json::parse(c.patch));
        CAPTURE(c.patch);
        check_says(error_of([&] { load_tokenizer(j); }), {"tokenizer.json", c.says});
    }
}

TEST_CASE("the post-processor adds its ids only where they are asked for") {
    json j = tiny_tokenizer();
    j["added_tokens"] = {added_token(300, "<s>"), added_token(301, "</s>")};
    json one = json::parse(R"({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [300]}, "</s>": {"id": "</s>", "ids": [301]}}})");
    j["post_processor"] = one;
    CHECK(load_tokenizer(j).encode("a", true) == Ids{300, 97, 301});
    CHECK(load_tokenizer(j).encode("a") == Ids{97});
    CHECK(load_tokenizer(j).encode("", true) == Ids{300, 301});
    j["post_processor"] = {{"type", "Sequence"}, {"processors", {{{"type", "ByteLevel"}}, one}}};
    CHECK(load_tokenizer(j).encode("<s>a", true) == Ids{300, 300, 97, 301});
    j["post_processor"] = nullptr;
    CHECK(load_tokenizer(j).encode("a", true) == Ids{97});
}

TEST_CASE("merges may be strings or pairs; the lowest rank goes first, the leftmost of equals") {
    json j = tiny_tokenizer({"b c", "a b", "a a", "aa a", "\u0120 a"});
    Tokenizer strings = load_tokenizer(j);
    j["model"]["merges"] = json::parse(R"([["b", "c"], ["a", "b"], ["a", "a"], ["aa", "a"], ["\u0120", "a"]])");
    Tokenizer pairs = load_tokenizer(j);
    struct Case {
        std::string text;
        Ids ids;
    };
    for (const Case& c : std::vector<Case>{{"abc", {97, 256}},  // b c before a b
                                           {"abab", {257, 257}},
                                           {"aaaa", {258, 258}},
                                           {"aaaaa", {258, 259}},
                                           {"ab ac", {257, 260, 99}},
                                           {"", {}},
                                           {"\xC3\xA9", {0xC3, 0xA9}}}) {
        CHECK(strings.encode(c.text) == c.ids);
        CHECK(pairs.encode(c.text) == c.ids);
        CHECK(strings.decode(c.ids) == c.text);
    }
}

TEST_CASE("ignore_merges takes a word of the vocabulary as it is") {
    json j = tiny_tokenizer({"a b"});
    j["model"]["vocab"]["abc"] = 257;
    j["pre_tokenizer"]["use_regex"] = true;
    CHECK(load_tokenizer(j).encode("abc ab") == Ids{256, 99, 32, 256});
    j["model"]["ignore_merges"] = true;
    CHECK(load_tokenizer(j).encode("abc ab") == Ids{257, 32, 256});
}

TEST_CASE("splits keep matches and what is between them as they say") {
    struct Case {
        json split;
        std::string text;
        Ids ids;
    };
    const json space = {{"Regex", " +"}};
    for (const Case& c : std::vector<Case>{
             {split(space, "Isolated"), "a  a", {97, 257, 97}},  // 257: two spaces
             {split(space, "Isolated", true), "a  aa ", {97, 257, 256, 32}},  // 256: aa
             {{{"type", "Digits"}, {"individual_digits", true}}, "11aa", {49, 49, 256}},
             {{{"type", "Digits"}, {"individual_digits", false}}, "11aa", {258, 256}},
             {{{"type", "Digits"}}, "11aa", {258, 256}}}) {
        json j = tiny_tokenizer({"a a", "\u0120 \u0120", "1 1", "1 a"});
        j["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {c.split, j["pre_tokenizer"]}}};
        CAPTURE(j["pre_tokenizer"].dump());
        CHECK(load_tokenizer(j).encode(c.text) == c.ids);
    }
}

TEST_CASE("white space in a pattern is Unicode's White_Space") {
    for (std::string pattern : {"\\s", "[\\s]", "[^\\S]"}) {
        CAPTURE(pattern);
        Regex regex(pattern);
        for (const char* space : {"\t", "\n", "\v", "\f", "\r", " ", "\u0085", "\u00A0", "\u1680", "\u2000", "\u200A",
                                  "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"})
            CHECK(regex.find(space) == space);
        for (std::string other : {"\u180E", "\u200B", "\uFEFF", "\u2060", "\x1C", "\x1F", "_"})
            CHECK(regex.find(other) == "");
    }
}

TEST_CASE("added tokens are found in the text as it is, the longest first") {
    json j = tiny_tokenizer();
    j["normalizer"] = {{"type", "NFC"}};
    j["added_tokens"] = {added_token(300, "<a>"), added_token(301, "<a>b"), added_token(302, "a.c|[d]"),
                         added_token(303, "\\s"), added_token(304, "e\u0301"), added_token(305, "\n(")};
    Tokenizer t = load_tokenizer(j);
    struct Case {
        std::string text;
        Ids ids;
    };
    for (const Case& c : std::vector<Case>{{"<a>", {300}},
                                           {"<a>bb", {301, 98}},
                                           {"<a><a>b<a", {300, 301, 60, 97}},
                                           {"a.c|[d]", {302}},
                                           {"abc", {97, 98, 99}},
                                           {"\\s ", {303, 32}},
                                           {"e\u0301", {304}},  // before the normalizer
                                           {"u\u0301", {0xC3, 0xBA}},
                                           {"\n((", {305, 40}}}) {
        CAPTURE(c.text);
        CHECK(t.encode(c.text) == c.ids);
    }
    CHECK(t.decode(Ids{300, 97, 302}) == "<a>aa.c|[d]");
    CHECK(t.decode(Ids{299, -1, 1 << 30}) == "");  // ids that stand for nothing
    CHECK(t.is_special(300));
    CHECK(!t.is_special(97));
}
