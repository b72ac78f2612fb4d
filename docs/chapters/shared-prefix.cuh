// shared-prefix.cuh: decodes whose contexts begin with the same blocks read them once for all.
// Replaces plan of CudaDevice, and needs decode-attention and prefill-attention.
//
//   row 0   [ A ][ B ][ C ][ D ][ x ]         tile:  rows 0, 1, 2 with A B C D   (prefill_attend)
//   row 1   [ A ][ B ][ C ][ D ][ y ]         then each row alone with the rest, x, y or z, and the
//   row 2   [ A ][ B ][ C ][ D ][ z ]         tile's result merged into its own  (decode_attend)
//
// (Hydragen, Juravsky et al. 2024.) It does not always pay: a step does it if that saves enough
// pages.
#pragma once

#include "prefill-attention.cuh"

namespace cuda {

constexpr int kPrefixTiles = 128;  // most, of rows that share pages
constexpr int kPrefixRows = 4, kPrefixPages = 8;  // fewer are not worth it
constexpr int kFewest = 8;         // decodes of a step; up to this many nothing is shared

template <class Base>
class SharedPrefix : public Base {
public:
    SharedPrefix(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          on(this->switched_on("shared-prefix", this->decode_attention && this->prefill_attention ?
                                   "" : "it needs decode-attention and prefill-attention",
                               {"plan"}, "")) {
        const Shape& c = this->c;
        if (on) results = this->template make<float>(size_t(o.rows) * c.heads * kPrefixParts *
                                                     (c.head_dim + 2));
        this->prefix_results = results;
    }

protected:
    using Rows = std::span<int>;

    void carve(Carver& carver, StepArrays& s) override {
        Base::carve(carver, s);
        if (!on) return;
        carver.take(row_prefixes, s.rows);
        carver.take(row_groups, s.rows);
        carver.take(s.prompts, s.rows + kPrefixTiles);  // in place of Base's, which has no room
        this->prefixes = row_prefixes, this->grouped = row_groups;
    }

    void plan(StepArrays& s, const Step& step) override {
        Base::plan(s, step);
        if (on) share_prefixes(s, step);
    }

    // A captured step is launched for the most tiles, if it has some.
    void generalize(StepArrays& s) override {
        Base::generalize(s);
        if (on && s.tiles) s.tiles = most_tiles();
    }

    // Decodes whose tables begin with the same blocks attend to them together, if it saves enough.
    void share_prefixes(StepArrays& s, const Step& step) {
        const int decodes = s.header->decodes, others = s.header->tiles;
        const Rows rows(row_groups, size_t(decodes));
        std::copy_n(s.single, decodes, row_groups);
        for (int row : rows) row_prefixes[row] = {};
        if (decodes <= kFewest) return;
        std::ranges::sort(rows, [&](int a, int b) {
            return std::ranges::lexicographical_compare(full_pages(step, a), full_pages(step, b));
        });
        int64_t gain = 0;  // pages that are not read
        for (int begin = 0, end; begin < decodes; begin = end) {
            auto [last, shared, saved] = longest_group(step, rows, begin);
            end = last;
            if (end - begin < kPrefixRows || !add_group(s, step, begin, end, shared)) continue;
            gain += saved - 10 * (end - begin);  // what the merge of a row costs
        }
        if (gain * this->c.kv_heads * this->c.head_dim < share_from) {
            s.header->tiles = others;
            for (int row : rows) row_prefixes[row] = {};
        }
        s.tiles = s.header->tiles;
    }

    // The blocks of a row's table that are full, so that nobody writes to them any more.
    static std::span<const int> full_pages(const Step& step, int row) {
        return {step.table(row), size_t(step.positions[row] / kBlockSize)};
    }

    // Of rows in the order of their tables, begin .. end - 1 have so many first pages in common
    // that one row more would save less. saved: pages that are not read.
    struct Group {
        int end, shared, saved;
    };
    static Group longest_group(const Step& step, Rows rows, int begin) {
        const auto first = full_pages(step, rows[begin]);
        Group g = {begin + 1, int(first.size()), 0};
        for (; g.end < int(rows.size()); g.end++) {
            const auto other = full_pages(step, rows[g.end]);
            const int common = int(std::ranges::mismatch(first, other).in1 - first.begin());
            const int with = std::min(g.shared, common), saved = (g.end - begin) * with;
            if (with < kPrefixPages || saved < g.saved) break;
            g.shared = with, g.saved = saved;
        }
        return g;
    }

    // Makes tiles of rows begin .. end - 1 of row_groups; false if there are too many.
    bool add_group(StepArrays& s, const Step& step, int begin, int end, int shared) {
        const int tile = this->tile_rows(), tiles = (end - begin + tile - 1) / tile;
        const int blocks = this->c.kv_heads * ((s.header->decodes + tile - 1) / tile);
        const int most = std::min(kPrefixParts, std::max(1, shared / kPrefixPages));
        const int parts = std::clamp(kMinBlocks / 2 / blocks, 1, most);
        if (s.header->tiles + tiles * parts > s.tiles + most_tiles()) return false;
        for (int part = 0; part < parts; part++)
            for (int i = begin; i < end; i += tile) {
                int first = shared * part / parts, last = shared * (part + 1) / parts;
                s.prompts[s.header->tiles++] = {i, std::min(tile, end - i), last * kBlockSize - 1,
                    step.sequence[row_groups[begin]], first, last, part};
            }
        for (int i = begin; i < end; i++) row_prefixes[row_groups[i]] = {shared, parts, i};
        return true;
    }

    int most_tiles() const { return std::min(kPrefixTiles, 2 * kMinBlocks / this->c.kv_heads); }

    int64_t share_from = 500 << 10;  // numbers in pages to save in a layer: one more kernel's worth

private:
    const bool on;
    typename Base::template Array<float> results;  // [rows, KV, kPrefixParts, G, HD + 2]
    // In the step's arrays, the host's or the device's: where carve was last.
    PrefixPages* row_prefixes = nullptr;  // [T]
    int* row_groups = nullptr;            // [T]: rows, those that share pages side by side
};

}  // namespace cuda
