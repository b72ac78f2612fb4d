// cache.hpp: the paged KV cache's bookkeeping (PagedAttention, Kwon et al. 2023): which block of
// memory holds which 16 tokens of which sequence. It never touches keys and values themselves.
//
//   block        room for the keys and values of 16 tokens, in all layers; a number
//   block table  the blocks of one sequence, in order: token i is in block table[i / 16]
//
// Blocks are reference counted, and full ones can be found again by what they hold, so that equal
// beginnings are computed once: across requests, chat turns, samples, prompts and generated text.
// Invariants (tests/cache.cpp checks them):
//   - a block is either free (refs 0, in the free list) or referenced, never both;
//   - free() is blocks() again when all tables have been released;
//   - a free block stays findable until it is taken, and the one released first is taken first;
//   - a block that is findable or shared is never written: a write to a shared one copies it first.
// Read sampler.hpp next.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <span>
#include <vector>

constexpr int kBlockSize = 16;  // tokens in a block

class Cache {
public:
    // A block to be copied before the next write: from, to.
    using Copy = std::pair<int, int>;

    // reuse: whether full blocks can be found again (off: --no-prefix-cache).
    explicit Cache(int count, bool reuse = true) : reuse(reuse), all(count) {
        for (int b = 0; b < count; b++) all[b].place = free_list.insert(free_list.end(), b);
    }

    std::function<void(int block)> on_take;  // called when what a block held is forgotten

    int blocks() const { return int(all.size()); }
    int free() const { return int(free_list.size()); }
    int refs(int block) const { return all[block].refs; }
    bool findable(int block) const { return all[block].findable; }  // a prompt may begin with it
    static int blocks_for(int tokens) { return (tokens + kBlockSize - 1) / kBlockSize; }

    // Fills an empty table with the findable blocks that ids begin with; returns their tokens. The
    // last id is never among them, since it must be computed for its logits.
    int match(std::span<const int> ids, std::vector<int>& table) {
        uint64_t chain = 0;
        for (size_t end = kBlockSize; end < ids.size(); end += kBlockSize) {
            auto found = contents.find(content(chain, ids, end));
            if (found == contents.end()) break;
            Block& block = all[found->second];
            if (block.refs++ == 0) free_list.erase(block.place);
            table.push_back(found->second);
            chain = block.chain;
        }
        return int(table.size()) * kBlockSize;
    }

    // Makes room in table to write tokens begin .. end - 1: takes new blocks, and replaces shared
    // ones that would be written, adding them to copies. False, and nothing done, if blocks do not
    // suffice.
    bool reserve(std::vector<int>& table, int begin, int end, std::vector<Copy>& copies) {
        int need = std::max(0, blocks_for(end) - int(table.size()));
        auto written = std::span(table).subspan(std::min<size_t>(begin / kBlockSize, table.size()));
        for (int block : written) need += refs(block) > 1;
        if (need > free()) return false;
        for (int& block : written) {
            if (refs(block) == 1) continue;
            copies.push_back({block, take()});
            all[block].refs--;
            block = copies.back().second;
        }
        while (int(table.size()) < blocks_for(end)) table.push_back(take());
        return true;
    }

    // Tells that the first computed tokens of ids are in table by now, of which the first told were
    // so before: blocks that have become full can be found from now on.
    void publish(std::span<const int> ids, const std::vector<int>& table, int told, int computed) {
        for (int i = told / kBlockSize; reuse && (i + 1) * kBlockSize <= computed; i++) {
            Block& block = all[table[i]];
            Content held = content(i ? all[table[i - 1]].chain : 0, ids, (i + 1) * kBlockSize);
            auto [entry, is_new] = contents.emplace(held, table[i]);
            // where an equal block is known already, this one stays private
            block.chain = is_new ? ++chains : all[entry->second].chain;
            if (is_new) block.entry = entry, block.findable = true;
        }
    }

    // One more sequence uses the blocks of table.
    void share(const std::vector<int>& table) {
        for (int b : table) all[b].refs++;
    }

    // A sequence ends: gives its blocks back, the last first, so that beginnings live longest.
    void release(std::vector<int>& table) {
        for (; !table.empty(); table.pop_back()) {
            Block& block = all[table.back()];
            if (--block.refs == 0) block.place = free_list.insert(free_list.end(), table.back());
        }
    }

private:
    // What a full block holds: its ids, chained on the number of all that comes before them. Equal
    // contents have equal numbers, so to compare two of these is to compare all tokens up to here:
    // what chained hashes do in vLLM, without a hash that anybody could make collide.
    using Content = std::pair<uint64_t, std::array<int, kBlockSize>>;

    struct Block {
        int refs = 0;
        bool findable = false;
        uint64_t chain = 0;                      // number of what it and all before it hold
        std::map<Content, int>::iterator entry;  // in contents, while findable
        std::list<int>::iterator place;          // in free_list, while refs is 0
    };

    static Content content(uint64_t before, std::span<const int> ids, size_t end) {
        Content c = {before, {}};
        std::copy(ids.begin() + end - kBlockSize, ids.begin() + end, c.second.begin());
        return c;
    }

    // The free block that was released first; what it held is forgotten.
    int take() {
        int b = free_list.front();
        free_list.pop_front();
        if (all[b].findable) contents.erase(all[b].entry);
        if (on_take) on_take(b);
        all[b].refs = 1;
        all[b].findable = false;
        return b;
    }

    bool reuse;
    std::vector<Block> all;
    std::list<int> free_list;         // oldest first
    std::map<Content, int> contents;  // what can be found, and the block that holds it
    uint64_t chains = 0;              // numbers given out
};
