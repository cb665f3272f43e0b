// BLAKE3-256, unkeyed, of many ranges of device memory: https://github.com/BLAKE3-team/BLAKE3-specs (blake3.pdf).
//
// hash_groups: one thread hashes one chunk of 1 KiB, one thread block the subtree over its THREADS chunks (a group).
// join_groups: one thread block for each range of several groups joins their chaining values, in place.
// Relies on THREADS being a power of two, so that a group is a whole subtree of the range's tree.
// Needs sm_75 or later and no header. `one` is 1, passed as an argument to hide its value from the compiler (see `add`).

#ifndef THREADS
#error "compile with -DTHREADS=..., the number that the launches use"
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { RESIDENT = 1280 / THREADS };  // thread blocks on a multiprocessor: 48 registers a thread, and none is spilled
enum { BLOCK = 64, CHUNK = 1024, GROUP = THREADS * CHUNK };  // bytes
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

// A row of the table from the host. Every range has at least one group; groups are numbered over all ranges.
struct Range {
  u64 address;
  u64 nbytes;
  u64 first_group;
};

// Additions are written as multiply-adds: these issue to the multiplier, which would idle, while the xors and rotations
// keep the other integer unit busy. With a plain `+` the compiler issues many of them beside the xors: 10% slower (H100).
__device__ __forceinline__ u32 add(u32 a, u32 b, u32 one) { return a * one + b; }

__device__ __forceinline__ u32 rotr(u32 x, int n) { return __funnelshift_r(x, x, n); }

// The specification's G.
__device__ __forceinline__ void mix(u32 &a, u32 &b, u32 &c, u32 &d, u32 x, u32 y, u32 one) {
  a = add(add(a, x, one), b, one);  // b is computed last
  d = __byte_perm(d ^ a, 0, 0x1032);  // rotate by 16
  c = add(c, d, one);
  b = rotr(b ^ c, 12);
  a = add(add(a, y, one), b, one);
  d = __byte_perm(d ^ a, 0, 0x0321);  // rotate by 8
  c = add(c, d, one);
  b = rotr(b ^ c, 7);
}

// Costs nothing: the rounds are unrolled, so the compiler renames registers.
__device__ __forceinline__ void permute(u32 m[16]) {
  const u32 t[16] = {m[2], m[6],  m[3],  m[10], m[7], m[0],  m[4],  m[13],
                     m[1], m[11], m[12], m[5],  m[9], m[14], m[15], m[8]};
#pragma unroll
  for (int i = 0; i < 16; ++i) m[i] = t[i];
}

__device__ __forceinline__ void initial_value(u32 cv[8]) {
  const u32 iv[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
#pragma unroll
  for (int i = 0; i < 8; ++i) cv[i] = iv[i];
}

// The chaining value `cv` after one more block `m`; the root's is the digest.
__device__ __forceinline__ void compress(u32 cv[8], u32 m[16], u64 counter, u32 length, u32 flags, u32 one) {
  u32 v[16], iv[8];
  initial_value(iv);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = cv[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[8 + i] = iv[i];
  v[12] = (u32)counter;
  v[13] = (u32)(counter >> 32);
  v[14] = length;
  v[15] = flags;
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    mix(v[0], v[4], v[8], v[12], m[0], m[1], one);
    mix(v[1], v[5], v[9], v[13], m[2], m[3], one);
    mix(v[2], v[6], v[10], v[14], m[4], m[5], one);
    mix(v[3], v[7], v[11], v[15], m[6], m[7], one);
    mix(v[0], v[5], v[10], v[15], m[8], m[9], one);
    mix(v[1], v[6], v[11], v[12], m[10], m[11], one);
    mix(v[2], v[7], v[8], v[13], m[12], m[13], one);
    mix(v[3], v[4], v[9], v[14], m[14], m[15], one);
    permute(m);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) cv[i] = v[i] ^ v[i + 8];
}

__device__ __forceinline__ void unpack(u32 words[4], uint4 v) {
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

// Load a whole block from a multiple of 16 bytes. Lanes are 1 KiB apart: every load touches half a sector, and the next
// load finds the other half in the L1 cache. Staging through shared memory was slower (docs/decisions/0005).
__device__ __forceinline__ void load_aligned(u32 m[16], const u8 *source) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack(m + 4 * i, ((const uint4 *)source)[i]);
}

// Load up to a block from any address, zeros after its end. Reads aligned words with at least one byte of it: up to 3
// bytes outside of the range, never from a page that the range is not in.
__device__ __forceinline__ void load_any(u32 m[16], const u8 *source, int length) {
  const int skew = (int)((u64)source & 3);
  const u32 *words = (const u32 *)(source - skew);
  const int count = (skew + length + 3) / 4;
  u32 low = length > 0 ? words[0] : 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const u32 high = i + 1 < count ? words[i + 1] : 0;
    const int valid = length - 4 * i;  // bytes of this word and later ones
    const u32 mask = valid >= 4 ? 0xFFFFFFFFu : valid <= 0 ? 0u : (1u << (8 * valid)) - 1;
    m[i] = __funnelshift_r(low, high, 8 * skew) & mask;
    low = high;
  }
}

__device__ __forceinline__ void store_value(uint4 to[2], const u32 cv[8]) {
  to[0] = make_uint4(cv[0], cv[1], cv[2], cv[3]);
  to[1] = make_uint4(cv[4], cv[5], cv[6], cv[7]);
}

// Join `count` chaining values (two uint4 each, shared or global memory) into the first, by all threads of the block.
// Pairs of neighbours, level by level, an odd last one moving up as it is: the same tree as the specification's, whose
// left subtrees hold the largest power of two of chunks. `top` is added to the flags of the last join.
__device__ __forceinline__ void join(uint4 *values, u64 count, u32 top, u32 one) {
  while (count > 1) {
    const u64 parents = count / 2, left_over = count % 2;
    const u32 flags = PARENT | (count == 2 ? top : 0);
    for (u64 base = 0; base < parents + left_over; base += THREADS) {
      const u64 i = base + threadIdx.x;
      u32 cv[8], m[16];
      initial_value(cv);
      if (i < parents) {
        load_aligned(m, (const u8 *)(values + 4 * i));
        compress(cv, m, 0, BLOCK, flags, one);
      } else if (i < parents + left_over) {
        unpack(cv, values[4 * i]);
        unpack(cv + 4, values[4 * i + 1]);
      }
      __syncthreads();  // all have read; the values written next lie before those that later iterations read
      if (i < parents + left_over) store_value(values + 2 * i, cv);
      __syncthreads();
    }
    count = parents + left_over;
  }
}

// The range that a group belongs to: the last whose first group is not after it.
__device__ __forceinline__ u64 range_of(const Range *ranges, u64 range_count, u64 group) {
  u64 low = 0, high = range_count;
  while (high - low > 1) {
    const u64 middle = (low + high) / 2;
    if (ranges[middle].first_group <= group) low = middle;
    else high = middle;
  }
  return low;
}

// Grid: all groups. Writes the digest of a range of one group, and a chaining value for each group of other ranges.
// Scalar arguments are 64 bits wide, so that launches pass one kind of number.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hash_groups(const Range *ranges, u64 range_count, uint4 *group_values, uint4 *digests, u64 one64) {
  __shared__ uint4 values[2 * THREADS];
  const u32 one = (u32)one64;
  const u64 group = blockIdx.x;
  const u64 index = range_of(ranges, range_count, group);
  const Range range = ranges[index];
  const u64 offset = (group - range.first_group) * GROUP;
  const u32 nbytes = range.nbytes - offset < GROUP ? (u32)(range.nbytes - offset) : (u32)GROUP;
  const bool sole = range.nbytes <= GROUP;
  const u32 chunks = nbytes == 0 ? 1 : (nbytes + CHUNK - 1) / CHUNK;  // no bytes are one empty chunk

  if (threadIdx.x < chunks) {
    const u32 start = threadIdx.x * CHUNK;
    const u8 *source = (const u8 *)range.address + offset + start;
    const u32 length = nbytes - start < CHUNK ? nbytes - start : (u32)CHUNK;
    const u32 last = length == 0 ? 0 : (length - 1) / BLOCK;
    const bool aligned = ((u64)source & 15) == 0;
    const u64 counter = offset / CHUNK + threadIdx.x;
    const u32 end = CHUNK_END | (sole && chunks == 1 ? ROOT : 0);
    u32 cv[8], m[16];
    initial_value(cv);
#pragma unroll 1
    for (u32 block = 0; block <= last; ++block, source += BLOCK) {
      const u32 block_length = block < last ? (u32)BLOCK : length - last * BLOCK;
      if (aligned && block_length == BLOCK) load_aligned(m, source);
      else load_any(m, source, (int)block_length);
      const u32 flags = (block == 0 ? CHUNK_START : 0) | (block == last ? end : 0);
      compress(cv, m, counter, block_length, flags, one);
    }
    store_value(values + 2 * threadIdx.x, cv);
  }
  __syncthreads();
  join(values, chunks, sole ? ROOT : 0, one);
  uint4 *result = sole ? digests + 2 * index : group_values + 2 * group;
  if (threadIdx.x < 2) result[threadIdx.x] = values[threadIdx.x];
}

// Grid: all ranges. Ranges of one group have their digest already.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
join_groups(const Range *ranges, uint4 *group_values, uint4 *digests, u64 one64) {
  const Range range = ranges[blockIdx.x];
  if (range.nbytes <= GROUP) return;
  uint4 *values = group_values + 2 * range.first_group;
  join(values, (range.nbytes + GROUP - 1) / GROUP, ROOT, (u32)one64);
  if (threadIdx.x < 2) digests[2 * (u64)blockIdx.x + threadIdx.x] = values[threadIdx.x];
}
