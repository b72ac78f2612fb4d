// The block cache: sharing, copy on write, eviction, and that a hit is always what it claims to be.
#include "common.hpp"

namespace {

std::vector<int> counting(int from, int count) {
    std::vector<int> ids(count);
    std::iota(ids.begin(), ids.end(), from);
    return ids;
}

// Computes ids from begin on, as the engine does: room first, then what is full can be found.
std::vector<Cache::Copy> compute(Cache& cache, const std::vector<int>& ids, std::vector<int>& table,
                                 int begin) {
    std::vector<Cache::Copy> copies;
    REQUIRE(cache.reserve(table, begin, int(ids.size()), copies));
    cache.publish(ids, table, begin, int(ids.size()));
    return copies;
}

// Computes ids in a table of their own.
std::vector<int> computed(Cache& cache, const std::vector<int>& ids) {
    std::vector<int> table;
    compute(cache, ids, table, 0);
    return table;
}

// How many tokens of ids are found, and nothing else changes.
int found(Cache& cache, const std::vector<int>& ids) {
    std::vector<int> table;
    int tokens = cache.match(ids, table);
    CHECK(tokens == int(table.size()) * kBlockSize);
    cache.release(table);
    return tokens;
}

// Ids that often begin alike: whole blocks of one of two ids, seldom another id among them.
std::vector<int> alike(std::mt19937& random, int count) {
    std::vector<int> ids;
    for (int i = 0; i < count; i++) ids.push_back(i % kBlockSize ? ids.back() : int(random() % 2));
    if (count && random() % 4 == 0) ids[random() % count] = 2;
    return ids;
}

}  // namespace

TEST_CASE("a block is free or referenced, and all are free again when the tables are released") {
    Cache cache(10);
    CHECK(cache.blocks() == 10);
    CHECK(cache.free() == 10);
    std::vector<int> a = computed(cache, counting(0, 33)), b = computed(cache, counting(100, 16));
    std::vector<int> c;
    CHECK(a.size() == 3);
    CHECK(b.size() == 1);
    CHECK(cache.free() == 6);
    CHECK(cache.match(counting(0, 40), c) == 32);  // found blocks are shared, not taken
    CHECK(cache.free() == 6);
    CHECK(c == std::vector(a.begin(), a.begin() + 2));
    CHECK(cache.refs(a[0]) == 2);
    CHECK(cache.refs(a[2]) == 1);
    cache.release(a);
    CHECK(a.empty());
    CHECK(cache.free() == 7);
    cache.release(b);
    cache.release(c);
    CHECK(cache.free() == 10);
    for (int block = 0; block < 10; block++) CHECK(cache.refs(block) == 0);
    CHECK(cache.match(counting(0, 40), c) == 32);  // a free block that is found is free no longer
    CHECK(cache.free() == 8);
}

TEST_CASE("a prompt of n tokens that is wholly cached has floor((n - 1) / 16) * 16 of them found") {
    Cache cache(20);
    std::vector<int> table = computed(cache, counting(0, 100));
    cache.release(table);
    for (int n = 1; n <= 96; n++) CHECK(found(cache, counting(0, n)) == (n - 1) / 16 * 16);
    CHECK(found(cache, counting(0, 101)) == 96);  // the last four never filled a block
}

TEST_CASE("the same ids behind another beginning are no hit") {
    Cache cache(20);
    std::vector<int> a = counting(0, 48), b = counting(100, 16);
    computed(cache, a);
    CHECK(found(cache, counting(16, 33)) == 0);  // a's second block is no beginning
    b.insert(b.end(), a.begin() + 16, a.end());
    b.push_back(7);
    CHECK(found(cache, b) == 0);
    computed(cache, counting(100, 16));
    CHECK(found(cache, b) == 16);  // its own first block, not what follows in a
    computed(cache, b);
    CHECK(found(cache, b) == 48);
    for (int i = 0; i < 48; i++) {  // any id that differs ends the hit in front of its block
        std::vector<int> other = counting(0, 49);
        other[i] = -1;
        CHECK(found(cache, other) == i / 16 * 16);
    }
}

TEST_CASE("generated tokens are found as well, once their block is full") {
    Cache cache(8);
    std::vector<int> ids = counting(0, 20), table = computed(cache, ids);
    for (int n = 20; n < 70; n++) {
        std::vector<Cache::Copy> copies;
        ids.push_back(1000 + n);
        REQUIRE(cache.reserve(table, n, n + 1, copies));
        CHECK(copies.empty());
        cache.publish(ids, table, n, n + 1);
        std::vector<int> next = ids;
        next.push_back(7);
        CHECK(found(cache, next) == (n + 1) / 16 * 16);
    }
    cache.release(table);
    CHECK(found(cache, ids) == 64);
}

TEST_CASE("a block is found only after its last token was computed") {
    Cache cache(8);
    std::vector<int> ids = counting(0, 33), table;
    std::vector<Cache::Copy> copies;
    cache.reserve(table, 0, 33, copies);
    cache.publish(ids, table, 0, 15);
    CHECK(found(cache, ids) == 0);
    cache.publish(ids, table, 15, 31);
    CHECK(found(cache, ids) == 16);
    cache.publish(ids, table, 31, 32);
    CHECK(found(cache, ids) == 32);
}

TEST_CASE("two sequences that compute the same at the same time are found once, and go on alike") {
    Cache cache(8);
    std::vector<int> ids = counting(0, 32), a = computed(cache, ids), b = computed(cache, ids), c;
    CHECK(a[0] != b[0]);
    ids = counting(0, 48);
    compute(cache, ids, b, 32);
    CHECK(cache.match(counting(0, 49), c) == 48);
    CHECK(c == std::vector{a[0], a[1], b[2]});
}

TEST_CASE("a write to a shared block copies that block and no other") {
    Cache cache(10);
    std::vector<int> ids = counting(0, 40), a = computed(cache, ids), b = a, before = a;
    cache.share(b);
    for (int block : a) CHECK(cache.refs(block) == 2);
    CHECK(cache.free() == 7);
    ids.push_back(40);
    std::vector<Cache::Copy> copies = compute(cache, ids, b, 40);
    CHECK(copies == std::vector<Cache::Copy>{{a[2], b[2]}});
    CHECK(b == std::vector{a[0], a[1], copies[0].second});
    CHECK(cache.refs(a[0]) == 2);
    CHECK(cache.refs(a[2]) == 1);
    CHECK(cache.refs(b[2]) == 1);
    CHECK(cache.free() == 6);
    CHECK(compute(cache, ids, a, 40).empty());  // a has its own by now
    CHECK(a == before);

    std::vector<int> c = a;  // a range of blocks, and new ones behind it
    cache.share(c);
    copies = compute(cache, counting(0, 50), c, 20);
    CHECK(copies == std::vector<Cache::Copy>{{a[1], c[1]}, {a[2], c[2]}});
    CHECK(c.size() == 4);
    CHECK(c[0] == a[0]);
    CHECK(cache.refs(a[0]) == 3);
    CHECK(cache.refs(a[1]) == 2);
    for (auto* table : {&a, &b, &c}) cache.release(*table);
    CHECK(cache.free() == 10);
}

TEST_CASE("reserve does all or nothing") {
    Cache cache(4);
    std::vector<int> a = computed(cache, counting(0, 40)), b = a, before = a;
    std::vector<Cache::Copy> copies;
    cache.share(b);
    CHECK(!cache.reserve(b, 40, 49, copies));  // one block to copy into and a new one; one is free
    CHECK(b == before);
    CHECK(copies.empty());
    CHECK(cache.free() == 1);
    for (int block : a) CHECK(cache.refs(block) == 2);
    std::vector<int> none;
    CHECK(!cache.reserve(none, 0, 17, copies));
    CHECK(none.empty());
    cache.release(a);
    CHECK(cache.reserve(b, 40, 49, copies));  // shared no longer
    CHECK(copies.empty());
    CHECK(b.size() == 4);
    CHECK(cache.free() == 0);
    CHECK(cache.reserve(b, 49, 64, copies));  // there is room in its last block
    CHECK(!cache.reserve(b, 64, 65, copies));
}

TEST_CASE("the block released first is taken first, of one sequence the last") {
    Cache cache(6);
    std::vector<int> a = computed(cache, counting(0, 48)), b = computed(cache, counting(100, 48));
    std::vector<int> order = {b[2], b[1], b[0], a[2], a[1], a[0]};
    cache.release(b);
    cache.release(a);
    std::vector<int> taken;
    for (int i = 0; i < 6; i++) {
        // looking puts the blocks back in the same order
        CHECK(found(cache, counting(100, 49)) == std::max(0, 3 - i) * 16);
        CHECK(found(cache, counting(0, 49)) == std::min(3, 6 - i) * 16);
        std::vector<Cache::Copy> copies;
        cache.reserve(taken, i * 16, i * 16 + 16, copies);
    }
    CHECK(found(cache, counting(0, 49)) == 0);
    CHECK(taken == order);
}

TEST_CASE("what is in use or was used lately outlives what was not") {
    Cache cache(5);
    std::vector<int> a = computed(cache, counting(0, 32)), b = computed(cache, counting(100, 32));
    cache.release(a);
    cache.release(b);
    CHECK(cache.match(counting(0, 33), a) == 32);  // a is in use again
    std::vector<int> c = computed(cache, counting(200, 48));
    CHECK(found(cache, counting(100, 33)) == 0);
    CHECK(found(cache, counting(0, 33)) == 32);
}

TEST_CASE("without reuse nothing is ever found") {
    Cache cache(8, false);
    std::vector<int> a = computed(cache, counting(0, 48));
    CHECK(found(cache, counting(0, 49)) == 0);
    cache.release(a);
    CHECK(found(cache, counting(0, 49)) == 0);
    CHECK(cache.free() == 8);
}

TEST_CASE("on_take tells when the contents of a block are forgotten, not before") {
    Cache cache(3);
    std::vector<int> told, a = computed(cache, counting(0, 48)), blocks = a, b;
    cache.on_take = [&](int block) { told.push_back(block); };
    cache.release(a);
    cache.match(counting(0, 49), a);
    cache.release(a);
    CHECK(told.empty());
    b = computed(cache, counting(100, 20));
    CHECK(told == std::vector{blocks[2], blocks[1]});
    CHECK(told == b);
}

TEST_CASE("with room for all, a match is the longest common beginning, in whole blocks") {
    std::mt19937 random(1);
    Cache cache(3000);
    std::vector<std::vector<int>> all;
    for (int i = 0; i < 400; i++) {
        std::vector<int> ids = alike(random, 1 + random() % 100), table;
        size_t longest = 0;
        for (const auto& other : all) {  // by comparing with every one
            size_t same = 0;
            while (same + 1 < ids.size() && same < other.size() && ids[same] == other[same]) same++;
            longest = std::max(longest, same);
        }
        int tokens = cache.match(ids, table);
        CHECK(tokens == int(longest / 16 * 16));
        compute(cache, ids, table, tokens);
        if (random() % 2) cache.release(table);
        all.push_back(ids);
    }
}

namespace {

// A small pool under random use, and beside it a plain account of what must be so. Memory holds for
// each slot the number of the beginning (all ids up to here) whose keys and values it would hold.
struct CacheSimulation {
    struct Live {
        std::vector<int> ids, table;
    };
    struct Known {
        int block, version;
    };
    static constexpr int kBlocks = 14;
    Cache cache{kBlocks};
    std::mt19937 random{2};
    std::vector<Live> live;
    std::vector<std::array<int, kBlockSize>> memory{kBlocks};
    std::map<std::pair<int, int>, int> beginnings;    // (beginning, next id) -> its number
    std::vector<int> refs = std::vector(kBlocks, 0), version = refs;
    std::list<int> free_list;                         // oldest first
    std::map<std::vector<int>, Known> known;          // beginnings of whole blocks, to be found
    std::vector<int> taken;                           // by the cache, since we looked
    int versions = 0, hits = 0, copied = 0, refused = 0;

    CacheSimulation() {
        for (int b = 0; b < kBlocks; b++) free_list.push_back(b);
        cache.on_take = [this](int b) { taken.push_back(b), memory[b].fill(-1); };
    }

    std::vector<int> numbers(const std::vector<int>& ids) {
        std::vector<int> out;
        for (int id : ids) {
            std::pair<int, int> key = {out.empty() ? 0 : out.back(), id};
            out.push_back(beginnings.try_emplace(key, int(beginnings.size()) + 1).first->second);
        }
        return out;
    }

    // Slots of table, the first of ids, that do not hold what they should.
    int wrong(const std::vector<int>& ids, const std::vector<int>& table, int count) {
        std::vector<int> want = numbers(ids);
        int bad = 0;
        for (int i = 0; i < count; i++) bad += memory[table[i / 16]][i % 16] != want[i];
        return bad;
    }

    void add_refs(const std::vector<int>& table) {
        for (int b : table) if (refs[b]++ == 0) free_list.remove(b);
    }

    void release(Live& s) {
        for (size_t i = s.table.size(); i-- > 0;)
            if (--refs[s.table[i]] == 0) free_list.push_back(s.table[i]);
        cache.release(s.table);
    }

    // What known says of block b, if anything.
    auto holding(int b) {
        return std::ranges::find(known, b, [](const auto& entry) { return entry.second.block; });
    }

    // The oldest free blocks must have been taken, and what they held, with all that follows it,
    // need not be found any more.
    void account_taken() {
        for (int b : taken) {
            REQUIRE(!free_list.empty());
            CHECK(b == free_list.front());
            free_list.pop_front();
            refs[b] = 1;
            auto held = holding(b);
            if (held == known.end()) continue;
            std::vector<int> first = held->first;
            std::erase_if(known, [&](const auto& entry) {
                std::vector<int> ids = entry.first;
                ids.resize(std::min(ids.size(), first.size()));
                return ids == first;
            });
        }
        taken.clear();
    }

    void start(std::vector<int> ids) {
        Live s;
        s.ids = ids;
        int must = 0, got = cache.match(ids, s.table);
        auto beginning = [&](int count) { return std::vector(ids.begin(), ids.begin() + count); };
        while (must + 16 < int(ids.size()) && known.count(beginning(must + 16))) must += 16;
        CHECK(got >= must);
        CHECK(got < int(ids.size()));
        CHECK(wrong(ids, s.table, got) == 0);
        CHECK(taken.empty());
        hits += got / 16;
        add_refs(s.table);
        s.ids.resize(got);
        extend(s, {ids.begin() + got, ids.end()});
        live.push_back(s);
    }

    // Computes more ids, if there is room.
    void extend(Live& s, const std::vector<int>& more) {
        int begin = int(s.ids.size()), end = begin + int(more.size()), need = 0;
        for (int i = begin / 16; i < Cache::blocks_for(end); i++)
            need += i >= int(s.table.size()) || refs[s.table[i]] > 1;
        std::vector<int> before = s.table;
        std::vector<Cache::Copy> copies;
        bool room = cache.reserve(s.table, begin, end, copies);
        CHECK(room == (need <= int(free_list.size())));
        CHECK(int(taken.size()) == (room ? need : 0));
        if (!room) {
            refused++;
            CHECK(s.table == before);
            CHECK(copies.empty());
            return;
        }
        account_taken();
        for (auto [from, to] : copies) memory[to] = memory[from], refs[from]--, copied++;
        s.ids.insert(s.ids.end(), more.begin(), more.end());
        std::vector<int> values = numbers(s.ids);
        for (int i = begin; i < end; i++) {
            int b = s.table[i / 16];
            CHECK(refs[b] == 1);  // what is written is shared with nobody, and not known either
            CHECK((holding(b) == known.end()));
            memory[b][i % 16] = values[i];
        }
        cache.publish(s.ids, s.table, begin, end);
        for (int i = begin / 16; (i + 1) * 16 <= end; i++) know(s, i);
    }

    // Block i of s has become full. It must be found from now on, unless it follows a block that
    // was taken since and computed anew: the cache need not see that it continues that one as well.
    void know(const Live& s, int i) {
        int& mine = version[s.table[i]] = ++versions;
        if (i > 0) {
            auto parent = known.find({s.ids.begin(), s.ids.begin() + i * 16});
            if (parent == known.end() || parent->second.version != version[s.table[i - 1]]) return;
        }
        std::vector<int> beginning(s.ids.begin(), s.ids.begin() + (i + 1) * 16);
        mine = known.try_emplace(beginning, Known{s.table[i], mine}).first->second.version;
    }

    void check_all() {
        CHECK(cache.free() == int(free_list.size()));
        for (int b = 0; b < kBlocks; b++) CHECK(cache.refs(b) == refs[b]);
        for (const Live& s : live) CHECK(wrong(s.ids, s.table, int(s.ids.size())) == 0);
    }
};

}  // namespace

TEST_CASE("20,000 random operations agree with a plain account of blocks and contents") {
    CacheSimulation sim;
    std::mt19937& random = sim.random;
    for (int i = 0; i < 20'000; i++) {
        int what = random() % 8, which = sim.live.empty() ? -1 : int(random() % sim.live.size());
        if (which < 0 || (what < 2 && sim.live.size() < 6)) {
            sim.start(alike(random, 1 + random() % 90));
        } else if (what == 2 && sim.live.size() < 6) {
            CacheSimulation::Live child = sim.live[which];
            sim.cache.share(child.table);
            sim.add_refs(child.table);
            sim.live.push_back(child);
        } else if (what < 6) {
            auto& s = sim.live[which];
            std::vector<int> more = alike(random, random() % 3 ? 1 : 1 + random() % 20);
            // most often the same again: sequences that were one go on alike
            if (random() % 4 && !s.ids.empty()) std::ranges::fill(more, s.ids.back());
            if (s.ids.size() < 150) sim.extend(s, more);
        } else {
            sim.release(sim.live[which]);
            sim.live.erase(sim.live.begin() + which);
        }
        sim.check_all();
    }
    for (auto& s : sim.live) sim.release(s);
    CHECK(sim.cache.free() == CacheSimulation::kBlocks);
    CHECK(sim.hits > 1000);  // all this did happen
    CHECK(sim.copied > 300);
    CHECK(sim.refused > 300);
}
