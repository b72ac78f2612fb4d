// files.hpp: how commands write files, so that nothing is half-written: LineFile grows by a whole
// line at a time and goes on where it was; WholeFile appears when all of it is there.
#pragma once

#include <fcntl.h>
#include <sys/file.h>

namespace fs = std::filesystem;

// A file of JSON lines, or (path "-") stdout. Each is written whole, and a file that has some goes
// on: a last line that is torn is cut off. One run at a time.
class LineFile {
public:
    // begin: how each line begins; take(json) gets those that are there
    LineFile(const string& path, const string& begin, const auto& take) : path(path), fd(1) {
        if (path == "-") return;
        fd = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND, 0666);
        if (fd < 0) fail(path, ": ", strerror(errno), "; give another -o");
        if (flock(fd, LOCK_EX | LOCK_NB)) fail(path, ": another run is writing to it");
        regular = fs::is_regular_file(path);
        std::ifstream file(path, std::ios::binary);
        int64_t count = 0;
        for (string line; regular && std::getline(file, line);) {
            json j = json::parse(line, nullptr, false);  // no exceptions
            bool ours = line.starts_with(begin) || begin.starts_with(line);
            bool torn = file.eof() || j.is_discarded();
            count++;
            if (!ours || (torn && !file.eof() && file.peek() != EOF))
                fail(path, ": line ", count, " is not from here; give another -o");
            if (torn) break;
            in_file(path, [&] { take(j); });
            size += off_t(line.size()) + 1;
        }
        if (regular && ftruncate(fd, size)) fail(path, ": ", strerror(errno));
    }
    ~LineFile() { if (fd != 1) close(fd); }

    // text: a line with its end
    void write(const string& text) {
        for (size_t at = 0; at < text.size();) {
            ssize_t n = ::write(fd, text.data() + at, text.size() - at);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) {
                int error = errno;
                if (regular && ftruncate(fd, size)) {}  // else the next run cuts it off
                fail(path, ": ", strerror(error), "; make room, then run again: it goes on");
            }
            at += n;
        }
        size += off_t(text.size());
    }

private:
    string path;
    int fd;
    bool regular = false;  // can be cut
    off_t size = 0;        // of whole lines
};

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
