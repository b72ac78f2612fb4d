// A team (sampler.hpp) of CPU threads that plays a thread block, so that what is written for a team
// is tested without a GPU. Its threads meet in barriers that ThreadSanitizer understands: where the
// shared code lacks one, it tells.
#pragma once

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

class ThreadTeam {
    struct Common {
        std::barrier<> all;
        std::vector<uint64_t> values;  // of each thread, in a sum or maximum
        std::vector<std::vector<std::unique_ptr<std::barrier<>>>> groups;  // of 2^n threads
        struct alignas(16) Sixteen {
            unsigned char bytes[16];
        };
        std::vector<Sixteen> scratch;

        Common(int size, size_t bytes) : all(size), values(size), scratch((bytes + 15) / 16) {
            memset((void*)scratch.data(), 0xA5, scratch.size() * 16);  // nobody may count on zeros
            for (int n = 1; n <= 32 && n <= size; n *= 2) {
                auto& barriers = groups.emplace_back();
                for (int i = 0; i < size / n; i++)
                    barriers.push_back(std::make_unique<std::barrier<>>(n));
            }
        }
    };

    // Puts value where the others see it, and gives make(all threads' values from the first on).
    template <class T>
    static T exchange(std::barrier<>& barrier, uint64_t* values, int rank, T value, auto make) {
        static_assert(sizeof value <= sizeof *values);
        memcpy(&values[rank], &value, sizeof value);
        barrier.arrive_and_wait();
        T result = make([&](int i) {
            T other;
            memcpy(&other, &values[i], sizeof other);
            return other;
        });
        barrier.arrive_and_wait();
        return result;
    }
    template <class T>
    static T sum_of(std::barrier<>& barrier, uint64_t* values, int rank, int size, T value) {
        return exchange(barrier, values, rank, value, [&](auto of) {
            T sum = 0;
            for (int i = 0; i < size; i++) sum += of(i);
            return sum;
        });
    }
    template <class T>
    static T max_of(std::barrier<>& barrier, uint64_t* values, int rank, int size, T value) {
        return exchange(barrier, values, rank, value, [&](auto of) {
            T most = of(0);
            for (int i = 1; i < size; i++) most = of(i) > most ? of(i) : most;
            return most;
        });
    }

    Common& common;

public:
    int rank, size;
    char* scratch;

    ThreadTeam(Common& common, int rank, int size)
        : common(common), rank(rank), size(size), scratch((char*)common.scratch.data()) {}

    // Runs work(team) in so many threads, of which a block has 32, 64, ...; or in one.
    static void run(int size, size_t scratch_bytes, auto work) {
        Common common(size, scratch_bytes);
        std::vector<std::thread> threads;
        for (int rank = 0; rank < size; rank++)
            threads.emplace_back([&, rank] {
                ThreadTeam team(common, rank, size);
                work(team);
            });
        for (std::thread& thread : threads) thread.join();
    }

    void barrier() { common.all.arrive_and_wait(); }
    template <class T>
    T sum(T value) { return sum_of(common.all, common.values.data(), rank, size, value); }
    template <class T>
    T max(T value) { return max_of(common.all, common.values.data(), rank, size, value); }
    uint64_t before(uint64_t value, uint64_t& total) {
        total = sum(value);
        return exchange(common.all, common.values.data(), rank, value, [&](auto of) {
            uint64_t sum = 0;
            for (int i = 0; i < rank; i++) sum += of(i);
            return sum;
        });
    }
    void add(uint64_t& to, uint64_t amount) {
        std::atomic_ref(to).fetch_add(amount, std::memory_order_relaxed);
    }

    struct Group {
        std::barrier<>& barrier;
        uint64_t* values;
        int rank, size, index, count;

        template <class T>
        T sum(T value) { return sum_of(barrier, values, rank, size, value); }
        template <class T>
        T max(T value) { return max_of(barrier, values, rank, size, value); }
    };
    Group group(int n) {
        if (size == 1) n = 1;
        int log = 0;
        while (1 << log < n) log++;
        std::barrier<>& barrier = *common.groups.at(log).at(rank / n);
        return {barrier, &common.values[rank / n * n], rank % n, n, rank / n, size / n};
    }
};
