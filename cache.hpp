// cache.hpp: the paged KV cache's bookkeeping (PagedAttention, Kwon et al. 2023): which block of
// memory holds which 16 tokens of which sequence. It never touches keys and values themselves.
//
//   block        room for the keys and values of 16 tokens, in all layers; a number
//   block table  the blocks of one sequence, in order: token i is in block table[i / 16]
//
// Blocks are reference counted: a block in the tables of two sequences has two references. Full
// blocks can be found by what they hold. So equal beginnings are computed once: across requests,
// chat turns, samples, prompts and generated text.
// Invariants (tests/cache.cpp checks them):
//   - a block is either free (no references, in the free list) or referenced, never both;
//   - when all tables have been released, all blocks are free;
//   - a free block stays findable until it is taken, and the one released first is taken first;
//   - nobody writes to a findable block, nor to one with several references: a sequence that has to
//     write there gets a copy first.
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
    // A block whose keys and values have to be copied before the next write: from, to.
    using Copy = std::pair<int, int>;

    // count: how many blocks there are. reuse: whether full ones can be found (--no-prefix-cache).
    explicit Cache(int count, bool reuse = true) : reuse(reuse), pool(count) {
        for (int b = 0; b < count; b++) pool[b].place = free_list.insert(free_list.end(), b);
    }

    std::function<void(int block)> on_take;  // is called when a block's contents are forgotten

    int blocks() const { return int(pool.size()); }
    int free() const { return int(free_list.size()); }
    int refs(int block) const { return pool[block].refs; }
    bool findable(int block) const { return pool[block].findable; }
    static int blocks_for(int tokens) { return (tokens + kBlockSize - 1) / kBlockSize; }

    // Fills an empty table with the findable blocks that hold the beginning of ids; returns the
    // number of their tokens. The last id is never among them: its logits have to be computed.
    int match(std::span<const int> ids, std::vector<int>& table) {
        uint64_t chain = 0;
        for (size_t end = kBlockSize; end < ids.size(); end += kBlockSize) {
            auto found = contents.find(content(chain, ids, end));
            if (found == contents.end()) break;
            Block& block = pool[found->second];
            if (block.refs == 0) free_list.erase(block.place);
            block.refs++;
            table.push_back(found->second);
            chain = block.chain;
        }
        return int(table.size()) * kBlockSize;
    }

    // Makes room in table to write tokens begin .. end - 1: takes new blocks, and puts a new one in
    // place of each block that other sequences use, too, which it adds to copies. Where too few
    // blocks are free, it does nothing and returns false.
    bool reserve(std::vector<int>& table, int begin, int end, std::vector<Copy>& copies) {
        int need = std::max(0, blocks_for(end) - int(table.size()));  // new blocks
        auto written = std::span(table).subspan(std::min<size_t>(begin / kBlockSize, table.size()));
        for (int block : written) need += refs(block) > 1;
        if (need > free()) return false;
        for (int& block : written) {
            if (refs(block) == 1) continue;
            copies.push_back({block, take()});
            pool[block].refs--;
            block = copies.back().second;
        }
        while (int(table.size()) < blocks_for(end)) table.push_back(take());
        return true;
    }

    // The blocks of table hold the first `computed` tokens of ids by now. The full ones of these
    // blocks can be found from now on; an earlier call has published `published` tokens.
    void publish(std::span<const int> ids, const std::vector<int>& table, int published,
                 int computed) {
        if (!reuse) return;
        for (int i = published / kBlockSize; i < computed / kBlockSize; i++) {
            Block& block = pool[table[i]];
            uint64_t before = i > 0 ? pool[table[i - 1]].chain : 0;
            Content held = content(before, ids, (i + 1) * kBlockSize);
            auto [entry, is_new] = contents.emplace(held, table[i]);
            if (is_new) {
                block.chain = ++chains;
                block.entry = entry;
                block.findable = true;
            } else {  // another block holds the same and is found; this one stays private
                block.chain = pool[entry->second].chain;
            }
        }
    }

    // One more sequence uses the blocks of table.
    void share(const std::vector<int>& table) {
        for (int b : table) pool[b].refs++;
    }

    // A sequence ends: its table gives the blocks back. The last block goes first, so that it is
    // taken before the others, and beginnings stay findable longest.
    void release(std::vector<int>& table) {
        while (!table.empty()) {
            Block& block = pool[table.back()];
            block.refs--;
            if (block.refs == 0) block.place = free_list.insert(free_list.end(), table.back());
            table.pop_back();
        }
    }

private:
    // What a full block holds: its ids, behind the number of everything before them. Equal texts
    // have equal numbers, so who compares two of these compares all tokens up to the block's end.
    // vLLM chains hashes for this; here there is no hash for which anybody could make a collision.
    using Content = std::pair<uint64_t, std::array<int, kBlockSize>>;

    struct Block {
        int refs = 0;
        bool findable = false;
        uint64_t chain = 0;                      // the number of all tokens up to its end
        std::map<Content, int>::iterator entry;  // in contents, while findable
        std::list<int>::iterator place;          // in free_list, while refs is 0
    };

    static Content content(uint64_t before, std::span<const int> ids, size_t end) {
        Content c = {before, {}};
        std::copy(ids.begin() + end - kBlockSize, ids.begin() + end, c.second.begin());
        return c;
    }

    // Takes the free block that was released first, and forgets what it held.
    int take() {
        int b = free_list.front();
        free_list.pop_front();
        if (pool[b].findable) contents.erase(pool[b].entry);
        if (on_take) on_take(b);
        pool[b].refs = 1;
        pool[b].findable = false;
        return b;
    }

    bool reuse;
    std::vector<Block> pool;          // all blocks, by number
    std::list<int> free_list;         // oldest first
    std::map<Content, int> contents;  // what can be found -> the block that holds it
    uint64_t chains = 0;              // how many numbers have been given
};
