// A team (sampler.hpp) of CPU threads that plays a thread block, so that what is written for a team
// is tested without a GPU. ThreadSanitizer understands its barriers: where the shared code lacks
// one, it tells. A thread that leaves a loop too early, so that on a GPU the others would wait for
// it in vain, is an error, too.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

class ThreadTeam {
    static constexpr int kSizes = 6;  // of groups: 1, 2, 4, ... 32

    // Where the lanes of a group exchange values; buffers take turns.
    struct Lanes {
        std::atomic<uint64_t> values[2][32] = {};
        std::atomic<uint64_t> arrived = 0;
    };
    struct Common {
        std::barrier<> all;
        std::vector<uint64_t> values;  // of each thread, in a sum or maximum
        std::unique_ptr<Lanes[]> lanes[kSizes];
        struct alignas(16) Sixteen {
            unsigned char bytes[16];
        };
        std::vector<Sixteen> scratch;
        // How often each thread met its team, and its group of each size.
        std::vector<std::array<unsigned, kSizes + 1>> met;

        Common(int size, size_t bytes)
            : all(size), values(size), scratch((bytes + 15) / 16), met(size) {
            memset((void*)scratch.data(), 0xFF, scratch.size() * 16);  // as floats these are NaN
            for (int log = 0; log < kSizes; log++) lanes[log].reset(new Lanes[(size >> log) + 1]);
        }
    };

    // Puts value where the others see it, and gives make(all threads' values from the first on).
    template <class T>
    T exchange(T value, auto make) {
        uint64_t* values = common.values.data();
        static_assert(sizeof value <= sizeof *values);
        memcpy(&values[rank], &value, sizeof value);
        barrier();
        T result = make([&](int i) {
            T other;
            memcpy(&other, &values[i], sizeof other);
            return other;
        });
        common.all.arrive_and_wait();
        return result;
    }
    template <class T>
    static T sum_of(int size, auto of) {
        T sum = 0;
        for (int i = 0; i < size; i++) sum += of(i);
        return sum;
    }
    template <class T>
    static T max_of(int size, auto of) {
        T most = of(0);
        for (int i = 1; i < size; i++) most = of(i) > most ? of(i) : most;
        return most;
    }

    Common& common;

public:
    int rank, size;
    char* scratch;

    ThreadTeam(Common& common, int rank, int size)
        : common(common), rank(rank), size(size), scratch((char*)common.scratch.data()) {}

    // Runs work(team) in so many threads, of which a block has 32, 64, ...; or in one. Threads that
    // should have met and did not are an error, when all have come to an end.
    static void run(int size, size_t scratch_bytes, auto work) {
        Common common(size, scratch_bytes);
        std::vector<std::thread> threads;
        for (int rank = 0; rank < size; rank++)
            threads.emplace_back([&, rank] {
                ThreadTeam team(common, rank, size);
                work(team);
                team.leave();
            });
        for (std::thread& thread : threads) thread.join();
        for (int rank = 0; rank < size; rank++) {
            const auto& met = common.met[rank];
            if (met[kSizes] != common.met[0][kSizes])
                throw std::logic_error("a thread of the team misses a barrier, sum or maximum");
            // on a GPU all lanes of a warp, 32 threads, exchange values at once
            if (met != common.met[rank / 32 * 32])
                throw std::logic_error("a thread of a warp misses the sum or maximum of a group");
        }
    }

    void barrier() {
        common.met[rank][kSizes]++;
        common.all.arrive_and_wait();
    }
    template <class T>
    T sum(T value) {
        return exchange(value, [&](auto of) { return sum_of<T>(size, of); });
    }
    template <class T>
    T max(T value) {
        return exchange(value, [&](auto of) { return max_of<T>(size, of); });
    }
    uint64_t before(uint64_t value, uint64_t& total) {
        total = sum(value);
        return exchange(value, [&](auto of) { return sum_of<uint64_t>(rank, of); });
    }
    void add(uint64_t& to, uint64_t amount) {
        std::atomic_ref(to).fetch_add(amount, std::memory_order_relaxed);
    }

    // A sum or maximum of a group is no barrier, for whatever else its lanes write. So they wait for
    // each other by relaxed atomics and a fence, of which ThreadSanitizer makes nothing.
    struct Group {
        Lanes& lanes;
        unsigned& met;
        int rank, size, index, count;

        template <class T>
        T sum(T value) {
            return exchange(value, [&](auto of) { return sum_of<T>(size, of); });
        }
        template <class T>
        T max(T value) {
            return exchange(value, [&](auto of) { return max_of<T>(size, of); });
        }

    private:
        template <class T>
        T exchange(T value, auto make) {
            static_assert(sizeof value <= sizeof(uint64_t));
            uint64_t bits = 0;
            memcpy(&bits, &value, sizeof value);
            auto& values = lanes.values[met++ % 2];
            values[rank].store(bits, std::memory_order_relaxed);
            fence();
            lanes.arrived.fetch_add(1, std::memory_order_relaxed);
            while (lanes.arrived.load(std::memory_order_relaxed) < uint64_t(met) * unsigned(size))
                std::this_thread::yield();
            fence();
            return make([&](int i) {
                uint64_t bits = values[i].load(std::memory_order_relaxed);
                T other;
                memcpy(&other, &bits, sizeof other);
                return other;
            });
        }
        static void fence() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wtsan"  // that it makes nothing of it
            std::atomic_thread_fence(std::memory_order_seq_cst);
#pragma GCC diagnostic pop
        }
    };
    Group group(int n) {
        if (size == 1) n = 1;
        int log = 0;
        while (1 << log < n) log++;
        return {common.lanes[log][rank / n], common.met[rank][log], rank % n, n, rank / n, size / n};
    }

private:
    // Nobody waits for this thread any more.
    void leave() {
        common.all.arrive_and_drop();
        for (int log = 0; log < kSizes; log++) common.lanes[log][rank >> log].arrived += 1ull << 40;
    }
};
