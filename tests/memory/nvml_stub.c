/* NVML as a driver answers it, for a machine without one: a fixed set of GPUs.
 *
 *   GPU-plain     80 GiB, of which 50 GiB are free; two processes, one of an amount that is not told
 *   GPU-old       the same, of a driver that has only the first version of the memory call
 *   GPU-coherent  shares its host's memory: NVML reports none
 *   GPU-divided   in MIG mode; its instance is MIG-part, 10 GiB, of which 9 GiB are free
 *   GPU-zero      reports a size of 0
 *   GPU-lost      has fallen off the bus
 *   GPU-crowded   40 processes
 *
 * With -DNO_DRIVER, NVML does not initialise.
 */
#include <string.h>

enum { OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER_LOADED = 9, LOST = 15, MISMATCH = 25 };
#define GIB (1ULL << 30)

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;

static const char *devices[] = {"GPU-plain", "GPU-old", "GPU-coherent", "GPU-divided", "MIG-part", "GPU-zero", "GPU-lost", "GPU-crowded"};
static int initialised;

const char *nvmlErrorString(int code)
{
    switch (code) {
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case NO_DRIVER_LOADED: return "Driver Not Loaded";
    case LOST: return "GPU is lost";
    default: return "Other";
    }
}

int nvmlInit_v2(void)
{
#ifdef NO_DRIVER
    return NO_DRIVER_LOADED;
#endif
    initialised = 1;
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, const char **device)
{
    if (!initialised)
        return UNINITIALIZED;
    for (unsigned at = 0; at < sizeof devices / sizeof *devices; at++)
        if (!strcmp(devices[at], uuid)) {
            *device = devices[at];
            return OK;
        }
    return NOT_FOUND;
}

static int is(const char *device, const char *uuid) { return !strcmp(device, uuid); }

int nvmlDeviceGetMigMode(const char *device, unsigned *current, unsigned *pending)
{
    if (is(device, "MIG-part"))
        return INVALID;
    if (is(device, "GPU-old"))
        return NOT_SUPPORTED;
    *current = *pending = is(device, "GPU-divided");
    return OK;
}

static int measure(const char *device, unsigned long long *total, unsigned long long *unused)
{
    if (is(device, "GPU-coherent"))
        return NOT_SUPPORTED;
    if (is(device, "GPU-lost"))
        return LOST;
    *total = is(device, "GPU-zero") ? 0 : is(device, "MIG-part") ? 10 * GIB : 80 * GIB;
    *unused = is(device, "GPU-zero") ? 0 : is(device, "MIG-part") ? 9 * GIB : 50 * GIB;
    return OK;
}

int nvmlDeviceGetMemoryInfo_v2(const char *device, memory_v2 *found)
{
    if (is(device, "GPU-old") || found->version != (sizeof *found | 2 << 24))
        return MISMATCH;
    int code = measure(device, &found->total, &found->free);
    found->reserved = GIB / 2;
    found->used = found->total - found->reserved - found->free;
    return code;
}

int nvmlDeviceGetMemoryInfo(const char *device, memory_v1 *found)
{
    int code = measure(device, &found->total, &found->free);
    found->used = found->total - found->free;
    return code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const char *device, unsigned *count, process *table)
{
    unsigned running = is(device, "GPU-plain") ? 2 : is(device, "GPU-crowded") ? 40 : 0;
    if (is(device, "GPU-coherent"))
        return NOT_SUPPORTED;
    if (*count < running) {
        *count = running;
        return TOO_SMALL;
    }
    *count = running;
    for (unsigned at = 0; at < running; at++)
        table[at] = (process){100 + at, at == 1 ? ~0ULL : (at + 1) * GIB, ~0U, ~0U};
    return OK;
}
