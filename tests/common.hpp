// What the tests share: the engine itself, golden data, a folder for files, and running the binary.
#pragma once
#define NANOCU_NO_MAIN
#include "../nano.cu"

#ifndef NANOCU_TEAM_ALONE  // that is, without OpenMP
#include "../docs/chapters/all.hpp"
#endif

#include <doctest/doctest.h>
#include <sys/wait.h>

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;  // about ten times slower, so time tells nothing
#else
inline constexpr bool kSanitized = false;
#endif

inline const std::string kData = "tests/data/";
inline const std::string kDemo = "models/smollm2";
inline const std::vector<std::string> kTiny = {"llama3", "qwen2", "qwen3"};

inline json golden(const std::string& file) { return json::parse(read_file(kData + file)); }

// A new folder under build/, removed at the end.
struct TempFolder {
    std::string path;
    TempFolder() {
        std::filesystem::create_directories("build");
        char name[] = "build/test-XXXXXX";
        if (!mkdtemp(name)) throw std::runtime_error("cannot make a folder in build/");
        path = name;
    }
    ~TempFolder() { std::filesystem::remove_all(path); }
    std::string operator/(const std::string& file) const { return path + "/" + file; }
    void write(const std::string& file, const std::string& text) const {
        std::ofstream(path + "/" + file, std::ios::binary) << text;
    }
};

// Bytes of KV memory that a block takes on the CPU.
inline size_t cpu_block_bytes(const Model& m) {
    return sizeof(float) * kBlockSize * m.config.layers * 2 * m.config.kv_dim();
}

struct Ran {
    int exit;  // status, or 128 + signal
    std::string out, err;
};

// Runs a shell command line.
inline Ran shell(const std::string& command) {
    TempFolder folder;
    int status = system(("( " + command + " ) >" + folder / "out" + " 2>" + folder / "err").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_file(folder / "out"),
            read_file(folder / "err")};
}

// The binary under test (NANOCU, set by the Makefile).
inline std::string binary() {
    const char* name = getenv("NANOCU");
    return name ? name : "./nanocu";
}
inline Ran nanocu(const std::string& arguments) { return shell(binary() + " " + arguments); }

// The message of what f throws; "" if it does not.
template <class F>
std::string error_of(F f) {
    try {
        f();
    } catch (const std::exception& e) {
        return e.what();
    }
    return "";
}

struct Finished {
    std::vector<int> ids;
    int cached = 0;
    std::string finish;
    std::vector<double> prompt_logprobs;
    std::vector<TokenLogprob> logprobs;
};

// Runs all requests to their end; results by (request, sample).
inline std::map<std::pair<int, int>, Finished> run_all(Engine& engine, const std::vector<Request>& requests) {
    std::map<std::pair<int, int>, Finished> results;
    int first = -1;
    for (const Request& r : requests) {
        int number = engine.add(r);
        if (first < 0) first = number;
    }
    while (engine.busy())
        for (Output& o : engine.step()) {
            Finished& f = results[{o.request - first, o.sample}];
            if (o.id >= 0) f.ids.push_back(o.id);
            f.cached = o.cached;
            f.logprobs.insert(f.logprobs.end(), o.logprobs.begin(), o.logprobs.end());
            if (o.finish) f.finish = o.finish;
            for (const auto& l : o.prompt_logprobs) f.prompt_logprobs.push_back(l[0].logprob);
        }
    return results;
}

inline Finished run_one(Engine& engine, const Request& r) { return run_all(engine, {r})[{0, 0}]; }

inline Request greedy(std::vector<int> prompt, int max_tokens) {
    Request r;
    r.prompt = std::move(prompt);
    r.max_tokens = max_tokens;
    return r;
}
