// Whatever a model folder may hold: what is wrong with it is one line that names it, and what is
// only unusual loads.
#include "common.hpp"

#include <immintrin.h>

namespace {

using Ids = vector<int>;

// A safetensors file with this header.
string safetensors(const string& header, const string& data) {
    uint64_t length = header.size();
    return string((const char*)&length, 8) + header + data;
}

struct TensorFile {
    json header;
    string data;
    string bytes() const { return safetensors(header.dump(), data); }
};

TensorFile read_tensors(const string& path) {
    string file = read_file(path);
    uint64_t length;
    memcpy(&length, file.data(), 8);
    return {json::parse(file.substr(8, length)), file.substr(8 + length)};
}

// A tiny model's config.json, with patch merged into it (null takes a key away).
void write_config(const TempFolder& folder, const string& model, const json& patch = {}) {
    json config = golden("models/" + model + "/config.json");
    if (!patch.is_null()) config.merge_patch(patch);
    folder.write("config.json", config.dump());
}

Config patched(const string& model, const string& patch) {
    TempFolder folder;
    write_config(folder, model, json::parse(patch));
    return load_config(folder.path);
}

// One line that holds all that it should say.
void check_says(const string& error, const vector<string>& expected) {
    CAPTURE(error);
    CHECK(error != "");
    CHECK(error.find('\n') == string::npos);
    for (const string& text : expected)
        CHECK_MESSAGE(error.find(text) != string::npos, text, " is not said");
}

// Greedy ids with the log-probability of each: equal only if the logits are, to the bit. On one
// thread: two would wait for each other where something else is running too.
vector<std::pair<int, double>> continued(const string& folder) {
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    Model m(folder);
    Engine e(m, {});
    Request r = greedy({1, 2, 3, 4, 5}, 8);
    r.logprobs = 0;
    vector<std::pair<int, double>> out;
    for (const TokenLogprob& t : run_one(e, r).logprobs) out.push_back({t.id, t.logprob});
    REQUIRE(out.size() == 8);
    omp_set_num_threads(threads);
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
            convert(float(number), to.data);
        }
        to.header[name] = t;
        to.header[name]["dtype"] = dtype;
        to.header[name]["data_offsets"] = {begin, to.data.size()};
    }
    return to;
}

// The character that stands for a byte in tokenizer.json, as GPT-2's bytes_to_unicode has it.
string byte_character(unsigned char byte) {
    auto printable = [](int b) { return (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD); };
    int code = byte;
    if (!printable(byte)) {
        code = 0x100;
        for (int b = 0; b < byte; b++) code += !printable(b);
    }
    if (code < 0x80) return string(1, char(code));
    return {char(0xC0 | code >> 6), char(0x80 | (code & 0x3F))};
}

// A tokenizer.json: ids 0 to 255 are the bytes, 256 and on what the merges make. Nothing splits.
json tiny_tokenizer(const vector<string>& merges = {}) {
    json vocab = json::object();
    for (int b = 0; b < 256; b++) vocab[byte_character(b)] = b;
    for (string merge : merges) {
        merge.erase(merge.find(' '), 1);
        vocab[merge] = vocab.size();
    }
    json whole = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    json model = {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}};
    return {{"model", model}, {"pre_tokenizer", whole}, {"added_tokens", json::array()}};
}

Tokenizer load_tokenizer(const json& j) {
    TempFolder folder;
    folder.write("tokenizer.json", j.dump());
    return Tokenizer(folder.path);
}

json added_token(int id, const string& content) {
    return {{"id", id}, {"content", content}, {"special", true}, {"normalized", false}};
}

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
        string model, key, value, says = key;
    };
    const vector<Case> cases = {
        {"llama3", "architectures", R"(["GPT2LMHeadModel"])", "GPT2LMHeadModel"},
        {"llama3", "architectures", R"(["MixtralForCausalLM"])", "MixtralForCausalLM"},
        {"llama3", "architectures", "[]", ""},
        {"llama3", "architectures", "null"},
        {"llama3", "hidden_act", R"("gelu")"},
        {"llama3", "attention_bias", "true"},
        {"qwen3", "attention_bias", "true"},
        {"llama3", "mlp_bias", "true"},
        {"llama3", "partial_rotary_factor", "0.5"},
        {"llama3", "quantization_config", R"({"quant_method": "fp8"})"},
        {"llama3", "sliding_window", "4096"},
        {"qwen2", "use_sliding_window", "true"},
        {"qwen3", "use_sliding_window", "true"},
        {"qwen3", "layer_types", R"(["full_attention", "sliding_attention"])", "sliding_attention"},
        {"llama3", "rope_parameters", R"({"rope_type": "yarn"})", "yarn"},
        {"qwen2", "rope_parameters", R"({"type": "yarn", "rope_type": null})", "yarn"},
        {"qwen2", "rope_parameters", R"({"rope_type": "linear", "factor": 4})", "linear"}};
    for (const Case& c : cases) {
        CAPTURE(c.key);
        string patch = str("{\"", c.key, "\": ", c.value, "}");
        string error = error_of([&] { patched(c.model, patch); });
        check_says(error, {"config.json", c.says});
    }
    string mistral = R"("architectures": ["MistralForCausalLM"], "sliding_window": )";
    check_says(error_of([&] { patched("llama3", "{" + mistral + "4096}"); }), {"sliding_window"});
    CHECK(patched("llama3", "{" + mistral + "null}").type == "mistral");
    string version4 = R"({"rope_parameters": null, "rope_scaling": {"type": "yarn", "factor": 4}})";
    check_says(error_of([&] { patched("qwen2", version4); }), {"yarn"});
}

TEST_CASE("a config.json with sizes that make no sense is refused") {
    struct Case {
        string key, value, says = key;
    };
    const vector<Case> cases = {{"vocab_size", "0"},
                                {"vocab_size", "null"},
                                {"vocab_size", "1e12"},
                                {"vocab_size", "1e300"},
                                {"hidden_size", "-128"},
                                {"hidden_size", "9223372036854775808"},
                                {"intermediate_size", "0"},
                                {"intermediate_size", "312", "multiple"},
                                {"num_hidden_layers", "0"},
                                {"num_hidden_layers", "1000000000000"},
                                {"num_attention_heads", "0"},
                                {"num_attention_heads", R"("four")", ""},
                                {"num_attention_heads", "[4]", ""},
                                {"num_key_value_heads", "-1"},
                                {"num_key_value_heads", "3", "heads"},
                                {"head_dim", "0"},
                                {"head_dim", "60", "multiple"},
                                {"max_position_embeddings", "0"},
                                {"rope_parameters", R"("llama3")", ""},
                                {"rope_parameters", R"({"factor": null})", "factor"},
                                {"eos_token_id", R"("two")", ""},
                                {"eos_token_id", "[2, null]", ""}};
    for (const Case& c : cases) {
        CAPTURE(c.key);
        CAPTURE(c.value);
        string patch = str("{\"", c.key, "\": ", c.value, "}");
        string error = error_of([&] { patched("llama3", patch); });
        check_says(error, {"config.json", c.says});
    }
    // a product of 2^32, which is 0 in 32 bits
    string product = R"({"head_dim": 4096, "num_attention_heads": 1048576})";
    check_says(error_of([&] { patched("llama3", product); }), {"config.json", "head"});
}

TEST_CASE("broken JSON is refused with the name of its file, whichever it is") {
    struct Case {
        string file;
        std::function<void(const string&)> load;
    };
    const vector<Case> cases = {
        {"config.json", [](const string& folder) { load_config(folder); }},
        {"generation_config.json", [](const string& folder) { load_config(folder); }},
        {"tokenizer.json", [](const string& folder) { Tokenizer t(folder); }},
        {"tokenizer_config.json", [](const string& folder) { Chat::load(folder); }},
        {"model.safetensors.index.json", [](const string& folder) { Model m(folder); }}};
    for (const Case& c : cases)
        for (string text : {"", "{", "{\"a\": 1} x", "[1, 2", "<html>\n<body>", "[\"\xFF\"]"}) {
            TempFolder folder;
            write_config(folder, "qwen2");
            folder.write(c.file, text);
            CAPTURE(text);
            check_says(error_of([&] { c.load(folder.path); }), {c.file});
        }
}

TEST_CASE("a safetensors file that is cut short or claims too much is refused") {
    const string whole = read_file(kData + "models/qwen2/model.safetensors");
    vector<string> files = {"", whole + "x", "version https://git-lfs.github.com/spec/v1\n"};
    for (size_t size : {size_t(7), size_t(8), size_t(1000), size_t(5000), whole.size() - 1})
        files.push_back(whole.substr(0, size));
    for (uint64_t length : {uint64_t(0), whole.size(), 1ul << 60, ~uint64_t(0), -uint64_t(8)})
        files.push_back(string((const char*)&length, 8) + whole.substr(8));
    for (const string& file : files) {
        TempFolder folder;
        write_config(folder, "qwen2");
        folder.write("model.safetensors", file);
        CAPTURE(file.size());
        check_says(error_of([&] { Model m(folder.path); }), {"model.safetensors"});
    }
}

TEST_CASE("a safetensors header that does not describe its data is refused") {
    // 32 bytes of data, of which the good tensor a has the first 16
    const string a = R"({"a": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]})";
    auto and_tensor = [&](const string& b) { return a + ", \"b\": {\"dtype\": " + b + "}}"; };
    auto error = [&](const string& header) {
        TempFolder folder;
        folder.write("model.safetensors", safetensors(header, string(32, 'x')));
        return error_of([&] { Weights w(folder.path, false); });
    };
    CHECK(error(and_tensor(R"("F32", "shape": [4], "data_offsets": [16, 32])")) == "");
    struct Case {
        string b, says = "b";
    };
    const vector<Case> cases = {
        {R"("F32", "shape": [4], "data_offsets": [16, 33])"},
        {R"("F32", "shape": [4], "data_offsets": [16, 1e30])"},
        {R"("F32", "shape": [4], "data_offsets": [16.5, 32])"},
        {R"("F32", "shape": [4], "data_offsets": [-16, 0])"},
        {R"("F32", "shape": [4], "data_offsets": [18446744073709551600, 0])"},
        {R"("F32", "shape": [4], "data_offsets": [32, 16])"},
        {R"("F32", "shape": [4], "data_offsets": [8, 24])"},            // overlaps a
        {R"("F32", "shape": [4], "data_offsets": [0, 16])", ""},        // all of it
        {R"("F32", "shape": [2], "data_offsets": [24, 32])"},           // leaves a hole
        {R"("F32", "shape": [2], "data_offsets": [16, 24])", "bytes"},  // leaves a rest
        {R"("F32", "shape": [4], "data_offsets": [16])", ""},
        {R"("F32", "shape": [4], "data_offsets": 16)", ""},
        {R"("F32", "shape": [4])", ""},
        {R"("F32", "shape": [5], "data_offsets": [16, 32])"},
        {R"("F32", "shape": [-4], "data_offsets": [16, 32])"},
        {R"("F32", "shape": ["4"], "data_offsets": [16, 32])"},
        {R"("F32", "shape": [4611686018427387905], "data_offsets": [16, 20])"},  // 4 n = 2^64 + 4
        {R"("F32", "shape": [1099511627776, 1099511627776], "data_offsets": [16, 32])"},  // 2^80
        {R"("I64", "shape": [2], "data_offsets": [16, 32])", "I64"},
        {R"("F8_E4M3", "shape": [16], "data_offsets": [16, 32])", "F8_E4M3"},
        {R"(7, "shape": [4], "data_offsets": [16, 32])", ""}};
    for (const Case& c : cases) {
        CAPTURE(c.b);
        check_says(error(and_tensor(c.b)), {"model.safetensors", c.says});
    }
    const string twice = R"(, "a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}})";
    const string same = R"(, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})";
    for (const string& header : {a, a + "}", a + twice, a + same, a + ", \"b\": 5}", "[" + a + "}]",
                                 string("[1, 2]"), string("null"), string("{}")}) {
        CAPTURE(header);
        check_says(error(header), {"model.safetensors"});
    }
}

TEST_CASE("weights that are not the config's are refused with what was expected and found") {
    auto error = [](const string& model, const string& patch, string name, const json& shape) {
        TempFolder folder;
        write_config(folder, model, json::parse(patch));
        TensorFile t = read_tensors(kData + "models/" + model + "/model.safetensors");
        if (!shape.is_null()) t.header[name]["shape"] = shape;
        else if (name != "") std::swap(t.header[name], t.header["another"]), t.header.erase(name);
        folder.write("model.safetensors", t.bytes());
        return error_of([&] { Model m(folder.path); });
    };
    const string norm = "model.norm.weight", down = "model.layers.1.mlp.down_proj.weight";
    check_says(error("qwen2", R"({"intermediate_size": 336})", "", {}),
               {"model.layers.0.mlp.gate_proj.weight", "[320,128]", "[336,128]"});
    check_says(error("qwen2", R"({"vocab_size": 511})", "", {}),
               {"model.embed_tokens.weight", "[512,128]", "[511,128]"});
    check_says(error("qwen2", R"({"num_hidden_layers": 4})", "", {}), {"layers.3.", "missing"});
    check_says(error("qwen2", R"({"tie_word_embeddings": false})", "", {}), {"lm_head", "missing"});
    check_says(error("qwen3", "{}", norm, {}), {norm, "missing"});
    check_says(error("qwen3", "{}", norm, {128, 1}), {norm, "[128]", "[128,1]"});
    check_says(error("qwen3", "{}", down, {320, 128}), {down, "[128,320]", "[320,128]"});
}

TEST_CASE("an index whose shards are missing, elsewhere or not named is refused") {
    const string tiny = kData + "models/llama3/", index = "model.safetensors.index.json";
    TempFolder folder;
    write_config(folder, "llama3");
    auto error = [&](const json& j) {
        folder.write(index, j.dump());
        return error_of([&] { Model m(folder.path); });
    };
    const json good = json::parse(read_file(tiny + index));
    for (int i = 1; i <= 6; i++) {
        string shard = str("model-0000", i, "-of-00006.safetensors");
        check_says(error(good), {shard, "missing"});
        folder.write(shard, read_file(tiny + shard));
    }
    CHECK(error(good) == "");
    for (const json& name : {json("../llama3/model.safetensors"), json(".."), json(6)}) {
        json away = good;
        away["weight_map"]["lm_head.weight"] = name;
        check_says(error(away), {name.is_string() ? name.get<string>() : index});
    }
    check_says(error({{"weight_map", "all"}}), {"all"});
    check_says(error({{"metadata", 1}}), {index, "weight_map"});
    json twice = good;  // the same tensors in two files
    twice["weight_map"]["other"] = "more.safetensors";
    folder.write("more.safetensors", read_file(folder / "model-00006-of-00006.safetensors"));
    check_says(error(twice), {".safetensors", "lm_head.weight"});
}

TEST_CASE("odd forms of a file give the same logits: header's length, spaces, metadata, shards") {
    const string tiny = kData + "models/qwen2";
    const auto expected = continued(tiny);
    TensorFile t = read_tensors(tiny + "/model.safetensors");
    TempFolder folder;
    write_config(folder, "qwen2");
    auto check = [&](const string& header) {
        folder.write("model.safetensors", safetensors(header, t.data));
        CHECK(continued(folder.path) == expected);
    };
    string header = t.header.dump();
    header += string(header.size() % 2, ' ');
    for (int spaces : {0, 1, 4097}) check(header + string(spaces, ' '));  // odd: not aligned
    check("\n   " + header);
    t.header["__metadata__"] = {{"format", "pt"}, {"note", "lm_head.weight"}};
    check(t.header.dump(1));
    t.header.erase("__metadata__");
    t.header["empty"] = {{"dtype", "F32"}, {"shape", {0, 7}}, {"data_offsets", {0, 0}}};
    check(t.header.dump());

    TempFolder merged;  // six shards in one file
    write_config(merged, "llama3");
    TensorFile all;
    for (int i = 1; i <= 6; i++) {
        string name = str("models/llama3/model-0000", i, "-of-00006.safetensors");
        TensorFile shard = read_tensors(kData + name);
        shard.header.erase("__metadata__");
        for (auto& tensor : shard.header)
            for (auto& offset : tensor["data_offsets"]) offset = size_t(offset) + all.data.size();
        all.header.update(shard.header);
        all.data += shard.data;
    }
    merged.write("model.safetensors", all.bytes());
    CHECK(continued(merged.path) == continued(kData + "models/llama3"));
}

TEST_CASE("F32 and F16 weights are rounded to bf16, which is said") {
    const string tiny = kData + "models/qwen3";
    const auto expected = continued(tiny);
    const TensorFile t = read_tensors(tiny + "/model.safetensors");
    CHECK(Model(tiny).weights.rounded == "");
    TempFolder folder;
    write_config(folder, "qwen3");
    auto found = [&](const char* dtype, auto convert) {
        folder.write("model.safetensors", in_dtype(t, dtype, convert).bytes());
        CHECK(Model(folder.path).weights.rounded == dtype);
        return continued(folder.path);
    };
    auto as_f32 = [](float f, string& out) { out.append((const char*)&f, 4); };
    CHECK(found("F32", as_f32) == expected);
    // what lies between two bf16 goes to the nearer one, the middle to the even one
    CHECK(found("F32", [&](float f, string& out) {
        uint32_t bits = std::bit_cast<uint32_t>(f);
        as_f32(std::bit_cast<float>(bits + (bits & 0x10000 ? 0x7FFF : 0x8000)), out);
    }) == expected);
    auto f16 = found("F16", [](float f, string& out) {  // exact down to 2^-17
        int exponent = std::ilogb(f);  // 2^exponent <= |f|; a subnormal half has 2^-14 for it
        uint16_t half = uint16_t(std::nearbyint(std::ldexp(std::abs(f), 10 - std::max(exponent, -14))));
        if (exponent >= -14) half += uint16_t(exponent + 14) << 10;
        half |= std::signbit(f) << 15;
        out.append((const char*)&half, 2);
    });
    for (size_t i = 0; i < expected.size(); i++) {
        CHECK(f16[i].first == expected[i].first);
        CHECK(f16[i].second == doctest::Approx(expected[i].second).epsilon(1e-3));
    }
}

TEST_CASE("conversions to and from bf16 and f16 are exact or rounded to the nearest, for all numbers") {
    int wrong = 0;
    for (uint32_t i = 0; i < 0x10000; i++) {
        // by the definition of IEEE 754's binary16
        int sign = i >> 15 ? -1 : 1, exponent = i >> 10 & 31, fraction = i & 1023;
        double expected = exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
        if (exponent == 31) expected = fraction ? NAN : INFINITY;
        float ours = f16_to_float(uint16_t(i));
        if (std::isnan(expected)) wrong += !std::isnan(ours);
        else wrong += ours != sign * expected;
        wrong += std::signbit(ours) != (sign < 0);
        float wide = std::bit_cast<bf16>(uint16_t(i));
        wrong += !std::isnan(wide) && bf16(wide).bits != i;
    }
    CHECK(wrong == 0);
    const vector<std::pair<uint32_t, uint16_t>> rounded = {
        {0x3F807FFF, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F808001, 0x3F81}, {0x3F818000, 0x3F82},
        {0x3F817FFF, 0x3F81}, {0xBF808000, 0xBF80}, {0x7F7FFFFF, 0x7F80}, {0x00008000, 0x0000}};
    for (auto [bits, bf] : rounded) CHECK(bf16(std::bit_cast<float>(bits)).bits == bf);
    CHECK(std::isnan(float(bf16(std::bit_cast<float>(0x7F800001)))));
}

TEST_CASE("a tied model ignores an lm_head in its file, and tensors that nobody asks for") {
    const string tiny = kData + "models/qwen2";
    TensorFile t = read_tensors(tiny + "/model.safetensors");
    size_t end = t.data.size(), head = 512 * 128 * 2;
    t.data += string(head + 8, 'x');
    t.header["lm_head.weight"] = {
        {"dtype", "BF16"}, {"shape", {512, 128}}, {"data_offsets", {end, end + head}}};
    t.header["unasked"] = {
        {"dtype", "F32"}, {"shape", {1, 2, 1}}, {"data_offsets", {end + head, end + head + 8}}};
    TempFolder folder;
    write_config(folder, "qwen2");
    folder.write("model.safetensors", t.bytes());
    CHECK(continued(folder.path) == continued(tiny));
    write_config(folder, "qwen2", {{"tie_word_embeddings", false}});  // now it counts
    CHECK(continued(folder.path) != continued(tiny));
}

TEST_CASE("ids that end a text are those of config.json and of generation_config.json") {
    struct Case {
        string config, generation;
        std::set<int> eos;
    };
    const vector<Case> cases = {{"null", "null", {}},        {"7", "null", {7}}, {"null", "9", {9}},
                                {"[7, 8]", "null", {7, 8}},  {"7", "7", {7}},    {"[7]", "[]", {7}},
                                {"7", "[9, 7]", {7, 9}}};
    for (const Case& c : cases) {
        TempFolder folder;
        write_config(folder, "llama3", {{"eos_token_id", json::parse(c.config)}});
        folder.write("generation_config.json", "{\"eos_token_id\": " + c.generation + "}");
        CHECK(load_config(folder.path).eos == c.eos);
    }
}

TEST_CASE("configs of transformers 4 and 5 mean the same") {
    auto inv_freq = [](const char* model, const string& patch) {
        return patched(model, "{\"rope_parameters\": " + patch + "}").inv_freq;
    };
    const string scaling = R"({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 64})";
    vector<float> scaled = patched("llama3", "{}").inv_freq;
    vector<float> plain = inv_freq("llama3", R"({"rope_type": "default"})");
    CHECK(scaled == inv_freq("llama3", R"(null, "rope_theta": 5e5, "rope_scaling": )" + scaling));
    CHECK(plain == inv_freq("llama3", R"(null, "rope_theta": 500000)"));
    CHECK(plain == inv_freq("llama3", R"(null, "rope_theta": 5e5, "rope_scaling": null)"));
    REQUIRE(plain.size() == 32);
    for (int i = 0; i < 32; i++)
        CHECK(plain[i] == doctest::Approx(std::pow(5e5, -i / 32.0)).epsilon(1e-6));
    CHECK(scaled[0] == plain[0]);
    CHECK(scaled[31] == plain[31] / 8);
    CHECK(inv_freq("qwen2", R"(null, "rope_theta": 1000000)") == patched("qwen2", "{}").inv_freq);
    double second = inv_freq("qwen2", "null")[1];  // transformers' default of rope_theta is 10000
    CHECK(second == doctest::Approx(std::pow(1e4, -1 / 32.0)).epsilon(1e-6));
}

TEST_CASE("sampling defaults follow generation_config.json") {
    struct Case {
        string text;
        float temperature, top_k = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
    };
    const vector<Case> cases = {
        {"{}", 0},
        {R"({"do_sample": false})", 0},
        {R"({"do_sample": false, "temperature": 0.6})", 0},
        {R"({"do_sample": null, "temperature": null, "top_k": null, "top_p": null})", 0},
        {R"({"do_sample": true})", 1},
        {R"({"temperature": 0.6})", 0.6f},
        {R"({"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8})", 0.7f, 20, 0.8f},
        {R"({"do_sample": true, "temperature": 0.3, "min_p": 0.15})", 0.3f, 0, 1, 0.15f},
        {R"({"repetition_penalty": 1.05})", 0, 0, 1, 0, 1.05f}};
    for (const Case& c : cases) {
        TempFolder folder;
        write_config(folder, "qwen3");
        folder.write("generation_config.json", c.text);
        Config config = load_config(folder.path);
        CAPTURE(c.text);
        CHECK(config.temperature == c.temperature);
        CHECK(config.top_k == c.top_k);
        CHECK(config.top_p == c.top_p);
        CHECK(config.min_p == c.min_p);
        CHECK(config.repetition_penalty == c.repetition_penalty);
    }
}

TEST_CASE("a tokenizer.json that asks for what is not built is refused by name") {
    struct Case {
        string key, value, says;
    };
    const string a_split = R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": )";
    const vector<Case> cases = {
        {"model", "null", "model"},
        {"model", R"({"type": "Unigram"})", "Unigram"},
        {"model", R"({"type": "WordPiece"})", "WordPiece"},
        {"model", R"({"byte_fallback": true})", "byte_fallback"},
        {"model", R"({"end_of_word_suffix": "</w>"})", "end_of_word_suffix"},
        {"model", R"({"continuing_subword_prefix": "##"})", "continuing_subword_prefix"},
        {"model", R"({"vocab": null})", "vocab"},
        {"model", R"({"vocab": {"a": -1}})", "-1"},
        {"model", R"({"vocab": {"a": 2000000000}})", "2000000000"},
        {"model", R"({"merges": ["a zz"]})", "a zz"},
        {"model", R"({"merges": ["ab"]})", "ab"},
        {"model", R"({"merges": [["a", "zz"]]})", "zz"},
        {"model", R"({"merges": [["a"]]})", ""},
        {"model", R"({"merges": [7]})", ""},
        {"normalizer", R"({"type": "Lowercase"})", "Lowercase"},
        {"normalizer", R"({"type": "Sequence", "normalizers": [{"type": "Replace"}]})", "Replace"},
        {"pre_tokenizer", R"({"type": "Metaspace"})", "Metaspace"},
        {"pre_tokenizer", R"({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]})",
         "Whitespace"},
        {"pre_tokenizer", R"({"type": "ByteLevel", "add_prefix_space": true})", "add_prefix_space"},
        {"pre_tokenizer", a_split + R"("Removed"})", "Removed"},
        {"pre_tokenizer", a_split + R"("MergedWithNext"})", "MergedWithNext"},
        {"pre_tokenizer", a_split + R"("Isolated", "pattern": {"Regex": "(a"}})", "(a"},
        {"pre_tokenizer", a_split + R"("Isolated", "pattern": {"Regex": "\\C"}})", "\\C"},
        {"post_processor", R"({"type": "RobertaProcessing"})", "RobertaProcessing"},
        {"post_processor", R"({"type": "Sequence", "processors": [{"type": "BertProcessing"}]})",
         "BertProcessing"},
        {"added_tokens", R"([{"id": 256, "content": "<x>", "lstrip": true}])", "<x>"},
        {"added_tokens", R"([{"id": 256, "content": "<x>", "single_word": true}])", "<x>"},
        {"added_tokens", R"([{"content": "<x>"}])", "id"}};
    for (const Case& c : cases) {
        json j = tiny_tokenizer();
        j.merge_patch(json::parse(str("{\"", c.key, "\": ", c.value, "}")));
        CAPTURE(c.value);
        check_says(error_of([&] { load_tokenizer(j); }), {"tokenizer.json", c.says});
    }
}

TEST_CASE("the post-processor adds its ids only where they are asked for") {
    json j = tiny_tokenizer();
    j["added_tokens"] = {added_token(300, "<s>"), added_token(301, "</s>")};
    const json both = json::parse(R"({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [300]},
                           "</s>": {"id": "</s>", "ids": [301]}}})");
    CHECK(load_tokenizer(j).encode("a", true) == Ids{97});
    j["post_processor"] = both;
    CHECK(load_tokenizer(j).encode("a", true) == Ids{300, 97, 301});
    CHECK(load_tokenizer(j).encode("a") == Ids{97});
    CHECK(load_tokenizer(j).encode("", true) == Ids{300, 301});
    j["post_processor"] = {{"type", "Sequence"}, {"processors", {{{"type", "ByteLevel"}}, both}}};
    CHECK(load_tokenizer(j).encode("<s>a", true) == Ids{300, 300, 97, 301});
}

TEST_CASE("merges may be strings or pairs; the lowest rank goes first, the leftmost of equals") {
    json j = tiny_tokenizer({"b c", "a b", "a a", "aa a", "\u0120 a"});
    const Tokenizer strings = load_tokenizer(j);
    json& merges = j["model"]["merges"];
    merges = json::parse(R"([["b", "c"], ["a", "b"], ["a", "a"], ["aa", "a"], ["\u0120", "a"]])");
    const Tokenizer pairs = load_tokenizer(j);
    const vector<std::pair<string, Ids>> cases = {{"abc", {97, 256}},  // b c before a b
                                                  {"abab", {257, 257}},
                                                  {"aaaa", {258, 258}},
                                                  {"aaaaa", {258, 259}},
                                                  {"ab ac", {257, 260, 99}},
                                                  {"", {}},
                                                  {"\xC3\xA9", {0xC3, 0xA9}}};
    for (const auto& [text, ids] : cases) {
        CHECK(strings.encode(text) == ids);
        CHECK(pairs.encode(text) == ids);
        CHECK(strings.decode(ids) == text);
    }
    check_says(error_of([&] { strings.encode("ab\xFF"); }), {"byte 2"});  // no added tokens here
}

TEST_CASE("ignore_merges takes a word of the vocabulary as it is") {
    json j = tiny_tokenizer({"a b"});
    j["model"]["vocab"]["abc"] = 257;
    j["pre_tokenizer"]["use_regex"] = true;
    CHECK(load_tokenizer(j).encode("abc ab") == Ids{256, 99, 32, 256});
    j["model"]["ignore_merges"] = true;
    CHECK(load_tokenizer(j).encode("abc ab") == Ids{257, 32, 256});
}

TEST_CASE("splits cut a text at their matches, and Digits at each digit or at runs of them") {
    struct Case {
        string split, text;
        Ids ids;
    };
    auto at = [](const string& pattern) {
        return R"({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": ")" + pattern +
               "\"}}";
    };
    const vector<Case> cases = {  // 256 aa, 257 two spaces, 258 11, 259 1a
        {at(" +"), "a  a", {97, 257, 97}},
        {at("a"), "aa1a", {97, 97, 49, 97}},
        {at("a+"), "aa1a", {256, 49, 97}},
        {at("x"), "aa1a", {256, 259}},
        {at("^a"), "aa", {97, 97}},
        {R"({"type": "Digits", "individual_digits": true})", "11aa", {49, 49, 256}},
        {R"({"type": "Digits", "individual_digits": false})", "11aa", {258, 256}}};
    for (const Case& c : cases) {
        json j = tiny_tokenizer({"a a", "\u0120 \u0120", "1 1", "1 a"});
        json part = json::parse(c.split);
        j["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {part, j["pre_tokenizer"]}}};
        CAPTURE(c.split);
        CHECK(load_tokenizer(j).encode(c.text) == c.ids);
    }
}

TEST_CASE("white space in a pattern is Unicode's White_Space") {
    json j = tiny_tokenizer({"a a"});
    for (string pattern : {"\\s", "[x\\s]"}) {
        j["pre_tokenizer"] = {
            {"type", "Split"}, {"behavior", "Isolated"}, {"pattern", {{"Regex", "a" + pattern}}}};
        const Tokenizer t = load_tokenizer(j);  // aa is one id unless there is a split between
        auto splits = [&](const string& text) { return t.encode("aa" + text)[0] == 97; };
        CAPTURE(pattern);
        for (const char* white :
             {"\t", "\n", "\v", "\f", "\r", " ", "\u0085", "\u00A0", "\u1680", "\u2000", "\u200A",
              "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"})
            CHECK(splits(white));
        for (const char* other : {"\u180E", "\u200B", "\uFEFF", "\u2060", "\x1C", "\x1F", "_"})
            CHECK(!splits(other));
    }
}

TEST_CASE("added tokens are found in the text as it is, the longest first") {
    json j = tiny_tokenizer();
    j["normalizer"] = {{"type", "NFC"}};
    j["added_tokens"] = {added_token(300, "<a>"), added_token(301, "<a>b"), added_token(303, "\n("),
                         added_token(302, "a.c|[d]"), added_token(304, "e\u0301")};
    const Tokenizer t = load_tokenizer(j);
    const vector<std::pair<string, Ids>> cases = {{"<a>", {300}},
                                                  {"<a>bb", {301, 98}},
                                                  {"<a><a>b<a", {300, 301, 60, 97}},
                                                  {"a.c|[d]", {302}},
                                                  {"abc", {97, 98, 99}},
                                                  {"\n((", {303, 40}},
                                                  {"e\u0301", {304}},  // before the normalizer
                                                  {"u\u0301", {0xC3, 0xBA}}};
    for (const auto& [text, ids] : cases) {
        CAPTURE(text);
        CHECK(t.encode(text) == ids);
    }
    CHECK(t.decode(Ids{300, 97, 302}) == "<a>aa.c|[d]");
    CHECK(t.decode(Ids{299, -1, 1 << 30}) == "");  // ids that stand for nothing
    CHECK(t.is_special(300));
    CHECK(!t.is_special(97));
}
