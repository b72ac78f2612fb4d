// `nanocu compress` and `nanocu tune`: what they measure against figures worked out here,
// what they write against the engine, and the settings file that every program reads.
#include "common.hpp"

#include "../docs/commands/files.hpp"
#include "../docs/commands/settings.hpp"

namespace {

const string kCompress = binary() + " compress " + kDemo + " -f tests/data/smollm2/perplexity.txt ";
const string kTinyModel = kData + "models/llama3";

// A model's folder with links to all files, to which others can be added.
struct LinkedModel : TempFolder {
    explicit LinkedModel(const string& from) {
        const fs::path path = this->path;
        for (const auto& entry : fs::directory_iterator(from))
            fs::create_symlink(fs::absolute(entry.path()), path / entry.path().filename());
    }
};

void check_one_line(const Ran& r, const string& says) {
    CAPTURE(r.err);
    CHECK(r.exit == 1);
    CHECK(r.out == "");
    CHECK(r.err.find('\n') == r.err.size() - 1);
    CHECK(r.err.find(says) != string::npos);
}

vector<float> floats(const Matrix& m) {
    vector<float> out(size_t(m.rows) * m.cols);
    std::copy(m.data, m.data + out.size(), out.begin());
    return out;
}

// The sum of squared differences over that of squares.
double error(const Matrix& a, const Matrix& b) {
    vector<float> x = floats(a), y = floats(b);
    double off = 0, all = 0;
    for (size_t i = 0; i < x.size(); i++)
        off += (x[i] - y[i]) * double(x[i] - y[i]), all += x[i] * double(x[i]);
    return off / all;
}

// The demo model after a method on some matrices of layer 5.
struct Written : TempFolder {
    Ran ran;
    std::unique_ptr<Model> model;
    Written(const string& method, const string& kind) {
        ran = shell(kCompress + "--tokens 16 --layer 5 --kinds " + kind + " --methods " + method +
                    " --write " + path);
        CAPTURE(ran.err);
        REQUIRE(ran.exit == 0);
        model = std::make_unique<Model>(path);
    }
};

}  // namespace

TEST_CASE("compress: int8 rows leave the perplexity, int4, pruning and low rank do not") {
    Ran r = shell(kCompress + "--tokens 16 --methods int8 --write build/compress-int8");
    CAPTURE(r.err);
    REQUIRE(r.exit == 0);
    CHECK(r.out.find("as large as before") != string::npos);
    // the engine's own score of what was written
    json score = json::parse(nanocu("score build/compress-int8 --no-special --json -f "
                                    "tests/data/smollm2/perplexity.txt").out);
    CHECK(fs::file_size("build/compress-int8/model.safetensors") ==
          doctest::Approx(fs::file_size(kDemo + "/model.safetensors")).epsilon(0.001));
    fs::remove_all("build/compress-int8");
    json expected = golden("smollm2/perplexity.json");
    double base = expected["perplexity"], int8 = score["perplexity"];
    CHECK(int8 == doctest::Approx(base).epsilon(0.01));
    CHECK(int8 != doctest::Approx(base).epsilon(0.00001));
    r = shell(kCompress + "--tokens 128 --json --kinds gate,up --methods int4,prune75,rank50");
    vector<json> lines;
    std::istringstream in(r.out);
    for (string line; std::getline(in, line);) lines.push_back(json::parse(line));
    REQUIRE(lines.size() == 10);  // gate, up and all, by three methods
    double start = lines[0]["perplexity"];
    CHECK(lines[3]["kind"] == "all");
    CHECK(lines[3]["perplexity"] > 1.1 * start);
    CHECK(lines[6]["perplexity"] > 5 * start);
    CHECK(lines[9]["perplexity"] > 5 * start);
    double n = 30 * 1536 * 576;  // numbers in gate
    CHECK(lines[1]["bytes"] == n / 2 + 2 * 30 * 1536);
    CHECK(lines[4]["bytes"] == n / 2 + n / 8);
    CHECK(lines[7]["bytes"] == 2.0 * 30 * 288 * (1536 + 576));
    CHECK(lines[3]["bytes_before"] == 2 * 2 * n);
}

TEST_CASE("compress: what is written is the rounded, pruned or factored matrix, else as it was") {
    Model demo(kDemo);
    const Layer& was = demo.layers[5];
    {
        Written w("int4/32", "q");
        const Layer& is = w.model->layers[5];
        vector<float> x = floats(was.q), y = floats(is.q);
        for (size_t begin = 0; begin < x.size(); begin += 32) {
            float largest = 0;
            for (size_t i = begin; i < begin + 32; i++) largest = std::max(largest, std::abs(x[i]));
            float scale = float(bf16(largest / 7));
            std::set<float> levels;
            for (size_t i = begin; i < begin + 32; i++) {
                levels.insert(y[i]);
                REQUIRE(std::abs(x[i] - y[i]) <= 0.5f * scale + 0.01f * largest);
            }
            REQUIRE(levels.size() <= 15);
        }
        CHECK(error(was.k, is.k) == 0);
        CHECK(error(demo.layers[4].q, w.model->layers[4].q) == 0);
        CHECK(error(demo.embed, w.model->embed) == 0);
        CHECK(is.attn_norm == was.attn_norm);
        CHECK(w.model->final_norm == demo.final_norm);
        CHECK(read_file(w / "tokenizer.json") == read_file(kDemo + "/tokenizer.json"));
    }
    {
        Written w("prune75", "k");
        vector<float> x = floats(was.k), y = floats(w.model->layers[5].k);
        float most_lost = 0, least_kept = INFINITY;
        size_t lost = 0;
        for (size_t i = 0; i < x.size(); i++) {
            if (y[i] == 0) most_lost = std::max(most_lost, std::abs(x[i])), lost++;
            else least_kept = std::min(least_kept, y[i] == x[i] ? std::abs(x[i]) : 0);
        }
        CHECK(most_lost <= least_kept);
        CHECK(lost == doctest::Approx(0.75 * double(x.size())).epsilon(0.0001));
    }
    // 1 less the part of the squared singular values that numpy's svd finds in the first half
    Written w("rank50", "q,k");
    CHECK(error(was.q, w.model->layers[5].q) == doctest::Approx(1 - 0.94685136).epsilon(0.005));
    CHECK(error(was.k, w.model->layers[5].k) == doctest::Approx(1 - 0.83745655).epsilon(0.005));
    CHECK(error(was.v, w.model->layers[5].v) == 0);
}

TEST_CASE("compress: the plot, and what it refuses") {
    TempFolder folder;
    Ran r = shell(kCompress + "--tokens 16 --layer 0 --kinds k,v --methods int8,prune50,rank50 " +
                  "--svg " + folder / "plot.svg");
    REQUIRE(r.exit == 0);
    string svg = read_file(folder / "plot.svg");
    CHECK(svg.starts_with("<svg "));
    CHECK(svg.find("prefers-color-scheme: dark") != string::npos);
    for (const char* mark : {"<circle", "<rect", "<path d="}) {
        int count = 0;  // a legend's, and one in each of k, v, all
        for (size_t at = 0; (at = svg.find(mark, at)) != string::npos; at++) count++;
        CHECK(count == 4);
    }
    const string few = kCompress + "--tokens 16 ";
    check_one_line(shell(few + "--methods int9"), "int9: not known");
    check_one_line(shell(few + "--methods prune50x"), "prune50x: not known");
    check_one_line(shell(few + "--kinds gates"), "gates: no such matrix");
    check_one_line(shell(few + "--layer 30 --kinds q"), "--layer 30: the model has 0 to 29");
    check_one_line(shell(few + "--write " + folder / "new"), "one method");
    check_one_line(shell(few + "--methods int8 --write " + folder.path), "is there already");
    check_one_line(shell(few + "--methods int8 --kinds k --write /dev/null/x"), "/dev/null/x");
    check_one_line(shell("ulimit -f 1000; trap '' XFSZ; " + few + "--methods int8 --kinds k " +
                         "--write " + folder / "full"), "full");
    size_t left = std::distance(fs::directory_iterator(folder.path), fs::directory_iterator());
    CHECK(left == 1);  // nothing but the plot
}

TEST_CASE("settings: taken for this machine only, after the flags, and told") {
    LinkedModel model(kTinyModel);
    auto rows_and_chunk = [&](const string& flags) {
        Ran r = nanocu("info " + model.path + " --device cpu --verbose " + flags);
        CAPTURE(r.err);
        CHECK(r.exit == 0);
        return r.err;
    };
    auto has = [](const string& text, const string& part) {
        return text.find(part) != string::npos;
    };
    json all = {{"another machine", {{"max-rows", 7}}}};
    model.write("nanocu.json", all.dump());
    CHECK(has(rows_and_chunk(""), "rows 64, chunk 512"));
    all[settings::machine("cpu")] = {{"threads", 1}, {"max-rows", 24}, {"chunk", 96}};
    model.write("nanocu.json", all.dump());
    string err = rows_and_chunk("");
    CHECK(has(err, "rows 24, chunk 96"));
    CHECK(has(err, "threads 1,"));
    CHECK(has(err, model.path + "/nanocu.json: chunk 96\n"));
    err = rows_and_chunk("--chunk 48 --threads 2");
    CHECK(has(err, "threads 2,"));
    CHECK(has(err, "rows 24, chunk 48"));
    CHECK_FALSE(has(err, "nanocu.json: chunk"));
    for (const json& bad : {json{{"chunk", 0}}, json{{"chunk", "many"}}, json{{"threads", 1e9}},
                            json{{"color", 3}}, json(5)}) {
        all[settings::machine("cpu")] = bad;
        model.write("nanocu.json", all.dump());
        check_one_line(nanocu("info --device cpu " + model.path), "/nanocu.json: ");
    }
    for (const char* bad : {"{", "[1]", "3"}) {
        model.write("nanocu.json", bad);
        check_one_line(nanocu("info --device cpu " + model.path), "/nanocu.json: ");
    }
}

TEST_CASE("tune: writes what it says for this machine, and leaves the others' alone") {
    LinkedModel model(kTinyModel);
    const string file = model / "nanocu.json";
    // chunks of 64 to 256 for prompts of 96: on a tiny model anything may win
    model.write("lengths", "96 3\n96 4\n96 5\n96 6\n");
    model.write("nanocu.json", R"({"another machine": {"max-rows": 7}})");
    const string command = binary() + " tune " + model.path + " --device cpu --rounds 2 " +
                           "--workload " + model / "lengths";
    Ran r = shell(command + " --dry-run");
    CAPTURE(r.err);
    CHECK(r.exit == 0);
    CHECK(json::parse(read_file(file)) == json{{"another machine", {{"max-rows", 7}}}});
    for (int run = 0; run < 3; run++) {  // the later ones with the settings of those before
        r = shell(command);
        CAPTURE(r.out);
        REQUIRE(r.exit == 0);
        CHECK(r.err.find("defaults: threads " + std::to_string(omp_get_num_procs()) +
                         ", max-rows 64, chunk 512") != string::npos);
        json all = json::parse(read_file(file));
        CHECK(all["another machine"] == json{{"max-rows", 7}});
        bool better = r.out.starts_with("best: ");
        CHECK(better != r.out.starts_with("the defaults stay"));
        REQUIRE(all.contains(settings::machine("cpu")) == better);
        if (!better) continue;
        const json& mine = all[settings::machine("cpu")];
        CHECK(r.out.starts_with(str("best: threads ", mine["threads"], ", max-rows ",
                                    mine["max-rows"], ", chunk ", mine["chunk"], "; ")));
        CHECK(std::stod(r.out.substr(r.out.find(';') + 2)) > 1);
    }
    check_one_line(shell(binary() + " tune " + model.path + " --workload /nowhere"), "/nowhere");
    model.write("lengths", "96 three\n");
    check_one_line(shell(command), "lengths");
    model.write("lengths", R"({"custom_id": "a", "url": "/v1/x", "body": {"prompt": [5]}})");
    check_one_line(shell(command), "request 1");
}
