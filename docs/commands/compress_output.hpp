// compress_output.hpp: how compress.hpp shows its results (a table, JSON,
// a plot) and writes a compressed model.
#pragma once

#include "compress_methods.hpp"
#include "files.hpp"
#include "objects.hpp"

namespace compress {

string megabytes(double bytes) { return str(std::fixed, std::setprecision(1), bytes / 1e6); }

string digits4(double x) {
    char text[32];
    snprintf(text, sizeof text, x < 9999.5 ? "%.4g" : "%.1e", x);
    return text;
}

using Names = vector<string>;

const Result& result_of(const vector<Result>& all, const string& kind, const string& method) {
    auto wanted = [&](const Result& r) { return r.kind == kind && r.method == method; };
    return *std::ranges::find_if(all, wanted);
}

void show(const Flags& f, const vector<Result>& results, const Names& kinds, const Names& methods,
          double base, size_t tokens, double whole) {
    if (f.json) {
        put_object({{"tokens", tokens}, {"perplexity", base}, {"bytes", whole}}, true);
        for (const Result& r : results)
            put_object({{"kind", r.kind}, {"method", r.method}, {"bytes_before", r.before},
                        {"bytes", r.bytes}, {"model_bytes", whole - r.before + r.bytes},
                        {"perplexity", r.perplexity}}, true);
        return;
    }
    auto table = [&](const string& title, const string& first, auto cell, auto before) {
        string out = str(std::left, std::setw(11), title, std::right, std::setw(8), first);
        for (const string& method : methods) out += str(std::setw(9), method);
        for (const string& kind : kinds) {
            double value = before(result_of(results, kind, methods[0]));
            out += str("\n", std::left, std::setw(11), kind, std::right, std::setw(8),
                       value == base ? digits4(value) : megabytes(value));
            for (const string& method : methods)
                out += str(std::setw(9), cell(result_of(results, kind, method)));
        }
        put(out + "\n");
    };
    put(str("weights of ", megabytes(whole), " MB in bf16; perplexity of ", tokens, " tokens\n\n"));
    table("MB", "bf16", [](const Result& r) { return megabytes(r.bytes); },
          [](const Result& r) { return r.before; });
    put("\n");
    table("perplexity", "bf16", [](const Result& r) { return digits4(r.perplexity); },
          [&](const Result&) { return base; });
}

// A panel for each kind: the size of its matrices against the perplexity, which is cut off at 32
// times the model's own: hollow marks at the top are beyond.
string plot(const vector<Result>& results, const Names& kinds, const Names& methods, double base) {
    const int w = 230, h = 150, columns = std::min(3, int(kinds.size()));
    const int per_row = 3 * columns, legend = (int(methods.size()) - 1) / per_row;
    const int top = 60 + 20 * legend, rows = (int(kinds.size()) + columns - 1) / columns;
    const int width = 50 + columns * (w + 50), height = top + rows * (h + 60);
    auto mark = [&](size_t method, double x, double y, bool hollow) {
        char shape = methods[method][0];
        string at = shape == 'i' ? str("<circle cx='", x, "' cy='", y, "' r='4.5'")
            : shape == 'p' ? str("<rect x='", x - 4, "' y='", y - 4, "' width='8' height='8'")
            : str("<path d='M", x, " ", y - 5, "l5 9h-10z'");
        string color = str("hsl(", 360 * method / methods.size(), " 70% 45%)");
        return str(at, " stroke='", color, "' fill='", hollow ? "none" : color, "'");
    };
    auto text = [](double x, double y, const char* anchor, const string& what) {
        return str("<text x='", x, "' y='", y, "' text-anchor='", anchor, "'>", what, "</text>\n");
    };
    string out = str("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ", width, " ", height,
        "' width='", width, "' height='", height, "' role='img'>\n"
        "<title>size against perplexity</title>\n<style>\n"
        "svg { background: #fff } text { font: 12px sans-serif; fill: #222 }\n"
        ".line { stroke: #8888; fill: none }\n@media (prefers-color-scheme: dark) {\n"
        "    svg { background: #161616 } text { fill: #ddd }\n}\n</style>\n");
    out += text(10, 18, "start", "perplexity against size, in % of bf16");
    for (size_t i = 0; i < methods.size(); i++) {
        double x = 20 + i % per_row * ((width - 20.0) / per_row), y = 38 + 20.0 * (i / per_row);
        out += mark(i, x, y, false) + "/>" + text(x + 10, y + 4, "start", methods[i]);
    }
    for (size_t k = 0; k < kinds.size(); k++) {
        double left = 60 + k % columns * (w + 50.0);
        double bottom = top + 25 + h + k / columns * (h + 60.0);
        string size_of = megabytes(result_of(results, kinds[k], methods[0]).before);
        out += text(left, bottom - h - 8, "start", kinds[k] + ", " + size_of + " MB");
        for (int i = 0; i <= 6; i++)
            out += text(left + i * w / 6.0, bottom + 16, "middle", str(20 * i));
        for (int i = 0; i <= 5; i++) {
            double y = bottom - i * h / 5.0;
            out += str("<path class='line' d='M", left, " ", y, "h", w, "'/>\n");
            out += text(left - 6, y + 4, "end", digits4(std::round(base * (1 << i))));
        }
        for (size_t i = 0; i < methods.size(); i++) {
            const Result& r = result_of(results, kinds[k], methods[i]);
            double doublings = std::log2(r.perplexity / base), size = 100 * r.bytes / r.before;
            bool beyond = !(doublings <= 5);
            double y = bottom - (beyond ? 5 : std::max(0.0, doublings)) * h / 5;
            out += str("<g><title>", methods[i], ": ", digits4(size), "%, perplexity ",
                       digits4(r.perplexity), "</title>",
                       mark(i, left + std::min(size, 120.0) * w / 120, y, beyond), "/></g>\n");
        }
    }
    return out + "</svg>\n";
}

void check_new(const string& folder) {
    if (fs::exists(folder) && !(fs::is_directory(folder) && fs::is_empty(folder)))
        fail(folder, ": is there already; give --write a new folder");
}

// Writes the model that has these tensors, and what else is in the folder from: into a folder
// beside to, which becomes to when all is there.
void write_model(const string& from, const string& to, const vector<Tensor>& tensors) {
    fs::path target = fs::absolute(to + "/").parent_path();
    string part = target.string() + ".XXXXXX";
    if (!mkdtemp(part.data())) fail(part, ": ", strerror(errno), "; give another --write");
    try {
        fs::permissions(part, fs::perms(0755));
        for (const auto& entry : fs::directory_iterator(from)) {
            string name = entry.path().filename();
            bool weights = name.find(".safetensors") != string::npos;
            for (const char* end : {".bin", ".gguf", ".pt", ".pth"}) weights |= name.ends_with(end);
            if (entry.is_regular_file() && !weights) fs::copy_file(entry.path(), part + "/" + name);
        }
        ordered header = {{"__metadata__", {{"format", "pt"}}}};
        size_t size = 0;
        for (const Tensor& t : tensors) {
            size_t n = t.view ? size_t(t.view->rows) * t.view->cols : t.floats.size(), begin = size;
            json shape = {n};
            if (t.view) shape = {t.view->rows, t.view->cols};
            size += n * sizeof(bf16);
            header[t.name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {begin, size}}};
        }
        string text = header.dump();
        text.resize((text.size() + 7) / 8 * 8, ' ');
        uint64_t length = text.size();
        std::ofstream file(part + "/model.safetensors", std::ios::binary);
        file.write((const char*)&length, 8) << text;
        for (const Tensor& t : tensors) {
            vector<bf16> own(t.floats.size());
            std::ranges::transform(t.floats, own.begin(), [](float f) { return bf16(f); });
            const bf16* data = t.view ? t.view->data : own.data();
            size_t n = t.view ? size_t(t.view->rows) * t.view->cols : own.size();
            file.write((const char*)data, n * sizeof(bf16));
            if (interrupted) fail(to, ": not written");
        }
        file.close();
        if (!file) fail(to, ": cannot be written; make room for ", megabytes(double(size)), " MB");
        fs::rename(part, target);
    } catch (...) {
        fs::remove_all(part);
        throw;
    }
}

}  // namespace compress
