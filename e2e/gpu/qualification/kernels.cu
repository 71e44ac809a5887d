/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels of the qualification, by the names and with the parameters (all of 64 bits) that
 * the fake driver's have, so that one program drives both.  Time is GPU time in slices of 20 us:
 * a slice that a pause falls into ends with it.
 */
#ifdef __CUDACC_RTC__ /* NVRTC has no headers of the system */
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#define SLICE_NS 20000u

static __device__ uint64_t now_ns(void)
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

static __device__ int is_first(void)
{
    return blockIdx.x == 0 && threadIdx.x == 0;
}

extern "C" __global__ void nop(void) {}

extern "C" __global__ void spin_us(uint64_t us)
{
    for (uint64_t n = us * 1000 / SLICE_NS; n; n--)
        for (uint64_t end = now_ns() + SLICE_NS; now_ns() < end;)
            ;
}

/* out[0]: the GPU's clock, written all the time; out[1]: slices done. Every thread keeps busy. */
extern "C" __global__ void timer_writer(uint64_t out_at, uint64_t us)
{
    volatile uint64_t *out = (volatile uint64_t *)out_at;
    for (uint64_t n = us * 1000 / SLICE_NS; n; n--) {
        for (uint64_t end = now_ns() + SLICE_NS, t; (t = now_ns()) < end;)
            if (is_first()) {
                out[0] = t;
                __threadfence_system();
            }
        if (is_first())
            out[1] = out[1] + 1;
    }
}

extern "C" __global__ void store32(uint64_t at, uint64_t value)
{
    *(volatile uint32_t *)at = (uint32_t)value;
}

extern "C" __global__ void fill32(uint64_t at, uint64_t value, uint64_t count)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        ((volatile uint32_t *)at)[i] = (uint32_t)value;
}

extern "C" __global__ void copy(uint64_t to, uint64_t from, uint64_t bytes)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 8; i += step)
        ((volatile uint64_t *)to)[i] = ((volatile uint64_t *)from)[i];
}

extern "C" __global__ void touch_pages(uint64_t base, uint64_t bytes, uint64_t stride, uint64_t value,
                                       uint64_t rounds)
{
    uint64_t first = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = first; i < bytes / stride; i += step)
            *(volatile uint32_t *)(base + i * stride) = (uint32_t)value;
}

/* Every thread folds the words that are its own; the sums meet in one word, in any order. *out must
 * be 0 before.  Another sum than the fake's, and the same in every run of the same shape. */
extern "C" __global__ void checksum(uint64_t at, uint64_t bytes, uint64_t rounds, uint64_t out)
{
    const volatile uint64_t *p = (const volatile uint64_t *)at;
    uint64_t first = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint64_t step = (uint64_t)gridDim.x * blockDim.x, sum = 1469598103934665603u + first;
    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = first; i < bytes / 8; i += step)
            sum = (sum ^ p[i]) * 1099511628211u;
    atomicXor_system((unsigned long long *)out, (unsigned long long)sum);
}
