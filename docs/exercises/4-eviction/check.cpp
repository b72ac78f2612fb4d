// Plays a workload on a Cache. In, on stdin: the number of blocks and whether to evict first in, first
// out; then a line for each event: "+ NAME IDS..." computes a sequence, "- NAME" releases it. Out: a
// line for each: how many tokens were found (-1: no room, nothing done), and how many blocks are free.
#include "../../../cache.hpp"

#include <iostream>
#include <sstream>
#include <string>

template <class C>
int play(int blocks, bool fifo) {
    if constexpr (std::is_constructible_v<C, int, bool, bool>) {
        C cache(blocks, true, fifo);
        std::map<std::string, std::vector<int>> tables;
        for (std::string line, sign, name; std::getline(std::cin, line);) {
            std::istringstream words(line);
            words >> sign >> name;
            std::vector<int> ids, &table = tables[name];
            for (int id; words >> id;) ids.push_back(id);
            int found = 0, size = int(ids.size());
            if (sign == "-") {
                cache.release(table);
            } else {
                std::vector<typename C::Copy> copies;
                found = cache.match(ids, table);
                if (cache.reserve(table, found, size, copies)) cache.publish(ids, table, found, size);
                else cache.release(table), found = -1;
            }
            std::cout << found << " " << cache.free() << "\n";
        }
        return 0;
    }
    std::cout << "Cache(int count, bool reuse, bool fifo): no such constructor\n";
    return 1;
}

int main() {
    int blocks, fifo;
    std::string rest;
    std::cin >> blocks >> fifo;
    std::getline(std::cin, rest);
    return play<Cache>(blocks, fifo);
}
