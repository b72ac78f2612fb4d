// whole_file.hpp: how forks write the files that they make. Behind nano.cu.
#pragma once

// A file that appears when it is whole, or not at all.
class WholeFile {
public:
    explicit WholeFile(const string& path) : path(path), temporary(path + ".part") {
        if (fs::exists(path) && !fs::is_regular_file(path)) fail(path, ": is not a file");
        file.open(temporary, std::ios::binary);
        if (!file) fail(path, ": ", strerror(errno), "; give another name");
    }
    WholeFile(const WholeFile&) = delete;
    ~WholeFile() { if (!finished) remove(temporary.c_str()); }

    void finish(const string& text) {
        file << text;
        file.close();
        if (!file || rename(temporary.c_str(), path.c_str()))
            fail(path, ": ", strerror(errno), "; nothing was written");
        finished = true;
    }

private:
    string path, temporary;
    std::ofstream file;
    bool finished = false;
};
