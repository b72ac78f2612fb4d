// settings.hpp: what `nanocu tune` found best on this machine, for all commands. MODEL/nanocu.json
// has the settings of each machine under its name; flags go before them.
#pragma once

#include <sys/utsname.h>

namespace settings {

// The processor's name; where the kernel tells none, the kind of machine.
string processor() {
    std::ifstream info("/proc/cpuinfo");
    for (string line; std::getline(info, line);)
        if (line.starts_with("model name")) return trim(line.substr(line.find(':') + 1));
    utsname names;
    return uname(&names) ? "unknown" : names.machine;
}

// What settings are for: a processor, its threads, and whether a GPU is used.
string machine([[maybe_unused]] const string& device) {
    const char* more = "";
#ifdef __CUDACC__
    int gpus = 0;
    if (device != "cpu" && cudaGetDeviceCount(&gpus) == cudaSuccess && gpus > 0) more = ", GPU";
#endif
    return str(processor(), " x ", omp_get_num_procs(), more);
}

void take(Flags& f) {
    const string path = f.model + "/nanocu.json";
    std::map<string, std::pair<int*, int>> known = {{"threads", {&f.threads, 1024}},
        {"max-rows", {&f.max_rows, 1 << 24}}, {"chunk", {&f.chunk, 1 << 24}}};
    with_json(path, [&](const json& j) {
        const json mine = j.is_object() ? value_or(j, machine(f.device), json::object()) : j;
        for (const auto& [name, value] : mine.items()) {
            auto [to, most] = known[name];
            if (!to || !value.is_number_unsigned() || value < 1 || value > most)
                fail("\"", name, "\": ", value, " is no setting; delete the file, tune again");
            if (*to) continue;  // a flag says otherwise
            *to = value;
            if (f.verbose) std::cerr << str(path, ": ", name, " ", *to, "\n");
        }
    }, true);
}

const bool kAdded = [] {
    fill_in = take;
    return true;
}();

}  // namespace settings
