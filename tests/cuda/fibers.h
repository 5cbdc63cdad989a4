// SPDX-License-Identifier: BSD-3-Clause
// A cluster of thread blocks on one thread of the CPU, for the bodies of csrc/cuda that need warps, barriers
// and the shared memory of other blocks. Every GPU thread is a fiber, so that a body runs as it is written:
// barriers and exchanges really wait for the threads that they wait for, and one that never comes is an
// error.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fibers {

constexpr int kWarp = 32;
constexpr size_t kStack = 96 * 1024;
constexpr size_t kGuard = 64;  // numbers behind a block's shared memory that nobody may touch
constexpr float kGuardValue = -12345.0f;

// So many arrivals, then the next generation.
struct Barrier {
    int size = 0, arrived = 0;
    int64_t generation = 0;
};

class Cluster {
  public:
    Cluster(int blocks, int threads, size_t shared_numbers)
        : threads_(threads), warps_(blocks * threads / kWarp), blocks_(blocks), fibers_(blocks * threads) {
        cluster_.size = blocks * threads;
        for (Block& block : blocks_) {
            block.barrier.size = threads;
            block.shared.assign(shared_numbers + kGuard, std::numeric_limits<float>::quiet_NaN());
            std::fill(block.shared.end() - kGuard, block.shared.end(), kGuardValue);
        }
        for (Warp& warp : warps_) warp.barrier.size = kWarp;
    }

    // body(block, thread) on every thread of every block; raises what a body raises.
    void run(const std::function<void(int, int)>& body) {
        body_ = &body;
        for (size_t i = 0; i < fibers_.size(); ++i) {
            Fiber& fiber = fibers_[i];
            fiber.stack.reset(new char[kStack]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = &scheduler_;
            const auto self = reinterpret_cast<uintptr_t>(this);
            makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Cluster::enter), 3,
                        static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), static_cast<int>(i));
        }
        size_t done = 0;
        while (done < fibers_.size()) {
            const int64_t before = progress_;
            for (size_t i = 0; i < fibers_.size(); ++i) {
                if (fibers_[i].done) continue;
                current_ = static_cast<int>(i);
                swapcontext(&scheduler_, &fibers_[i].context);
                if (!error_.empty()) throw std::runtime_error(error_);
                if (fibers_[i].done) ++done, ++progress_;
            }
            if (progress_ == before) throw std::runtime_error("a barrier waits for threads that never come");
        }
        for (const Block& block : blocks_)
            for (size_t i = block.shared.size() - kGuard; i < block.shared.size(); ++i)
                if (block.shared[i] != kGuardValue) throw std::runtime_error("wrote behind shared memory");
    }

    float* shared(int block) { return blocks_[block].shared.data(); }
    void sync_block(int block) { wait(blocks_[block].barrier); }
    void sync_cluster() { wait(cluster_); }

    float exchange(float value, int apart) {
        Warp& warp = warps_[current_ / kWarp];
        const int lane = current_ % kWarp;
        // two sets: a lane that is through may begin the next exchange before the others have read
        float* values = warp.values[warp.barrier.generation % 2];
        values[lane] = value;
        wait(warp.barrier);
        return values[lane ^ apart];
    }

  private:
    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        bool done = false;
    };
    struct Block {
        Barrier barrier;
        std::vector<float> shared;
    };
    struct Warp {
        Barrier barrier;
        float values[2][kWarp];
    };

    static void enter(unsigned high, unsigned low, int index) {
        auto* self = reinterpret_cast<Cluster*>(static_cast<uintptr_t>(high) << 32 | low);
        try {
            (*self->body_)(index / self->threads_, index % self->threads_);
        } catch (const std::exception& error) {
            self->error_ = error.what();
        }
        self->fibers_[index].done = true;
    }

    void wait(Barrier& barrier) {
        const int64_t generation = barrier.generation;
        if (++barrier.arrived == barrier.size) {
            barrier.arrived = 0;
            ++barrier.generation;
            ++progress_;
            return;
        }
        while (barrier.generation == generation) swapcontext(&fibers_[current_].context, &scheduler_);
    }

    int threads_, current_ = 0;
    int64_t progress_ = 0;
    std::string error_;
    Barrier cluster_;
    std::vector<Warp> warps_;
    std::vector<Block> blocks_;
    std::vector<Fiber> fibers_;
    ucontext_t scheduler_;
    const std::function<void(int, int)>* body_ = nullptr;
};

// The machine of a kernel's body, see csrc/cuda/machine.h.
struct Machine {
    Cluster* cluster;
    int block, thread_;
    int64_t x, y, rows;

    int thread() const { return thread_; }
    int64_t block_x() const { return x; }
    int64_t block_y() const { return y; }
    int64_t grid_y() const { return rows; }
    void sync() const { cluster->sync_block(block); }
    void sync_cluster() const { cluster->sync_cluster(); }
    float exchange(float value, int apart) const { return cluster->exchange(value, apart); }
    const float* of_rank(const float* shared, int rank) const {
        return cluster->shared(rank) + (shared - cluster->shared(block));
    }
};

}  // namespace fibers
