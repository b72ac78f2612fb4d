// objects.hpp: how commands show a few values: as text, or as JSON.
#pragma once

// One object on stdout: JSON, or a line for each value (lists are for JSON only).
void put_object(const ordered& j, bool as_json) {
    if (as_json) return put(j.dump() + "\n");
    for (auto& [key, value] : j.items())
        if (!value.is_array()) put(str(std::left, std::setw(20), key, value.dump(), "\n"));
}

void json_flag(CommandLine& line) {
    line.flag("--json", line.f.json, "JSON on stdout, one object a line");
}
