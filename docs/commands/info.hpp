// info: a model's shape, what fits here, and which file serves each op.
#pragma once

#include "objects.hpp"

namespace info {

void run(const Flags& f) {
    Session s(f);
    const Config& c = s.model.config;
    const Device& device = *s.engine.device;
    ordered j = {{"type", c.type}, {"layers", c.layers}, {"hidden", c.hidden}, {"heads", c.heads},
        {"kv_heads", c.kv_heads}, {"head_dim", c.head_dim}, {"intermediate", c.intermediate},
        {"vocabulary", c.vocab}, {"context", c.context}, {"parameters", s.model.weights.bytes / 2},
        {"weight_bytes", s.model.weights.bytes}, {"kv_bytes_per_token", device.token_bytes()},
        {"device", device.name}, {"threads", f.threads},
        {"kv_tokens_that_fit", int64_t(s.engine.cache.blocks()) * kBlockSize}};
    if (f.json) j["served"] = device.served;
    else for (const auto& [op, file] : device.served) j["op " + op] = file;
    put_object(j, f.json);
}

void add_flags(CommandLine& line) {
    json_flag(line);
    line.engine_flags();
}

const bool kAdded = add_command({"info", "the model's shape, and what fits here", add_flags, run});

}  // namespace info
