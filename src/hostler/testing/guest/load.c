/* Load: memory dirtied at a set rate, and numbered ticks on the serial line. */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include "guest.h"

#define PAGE 4096u
#define RESERVE (32ull << 20)
#define STEP_NS 2000000ull
#define MAX_DEBT_NS 50000000ull /* a guest that could not keep up, or stood still, does not make up for more than this */

struct load {
    uint64_t *memory;
    uint64_t pages, pages_per_s, written;
};

static struct load load;
static bool dirtying, ticking;
static uint64_t tick_ns;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

/* One word in each of the next pages, so that every one differs from what it was. Called with the guard held. */
static void dirty_pages(uint64_t count) {
    for (; count > 0; count--, load.written++)
        load.memory[(load.written % load.pages) * (PAGE / 8)] = mix64(load.written, 1);
}

static void *dirty_on(void *argument) {
    uint64_t done_until = now_ns();
    (void)argument;
    for (;;) {
        uint64_t now = now_ns();
        if (now - done_until > MAX_DEBT_NS)
            done_until = now - MAX_DEBT_NS;
        pthread_mutex_lock(&guard);
        uint64_t due = load.pages_per_s * (now - done_until) / 1000000000ull;
        if (due > 0) {
            dirty_pages(due);
            done_until += due * 1000000000ull / load.pages_per_s;
        }
        if (load.pages_per_s == 0)
            dirtying = false;
        bool over = !dirtying;
        pthread_mutex_unlock(&guard);
        if (over)
            return NULL;
        sleep_until_ns(now + STEP_NS);
    }
}

/* Refuse rather than be killed: the guest's only process dies with its kernel. */
static bool enough_memory(uint64_t pages) {
    struct sysinfo info;
    sysinfo(&info);
    return pages * PAGE + RESERVE < (uint64_t)info.freeram * info.mem_unit;
}

/* Random content: pages of zeros would travel as almost nothing. Called with the guard held. */
static bool allocate(uint64_t pages) {
    if (load.memory)
        munmap(load.memory, load.pages * PAGE);
    load = (struct load){0};
    if (pages == 0)
        return true;
    if (!enough_memory(pages))
        return false;
    void *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    load.memory = memory;
    load.pages = pages;
    for (uint64_t i = 0; i < pages * PAGE / 8; i++)
        load.memory[i] = mix64(boot_id, i);
    return true;
}

static bool set_load(uint64_t pages, uint64_t pages_per_s) {
    pthread_mutex_lock(&guard);
    bool good = pages == load.pages || allocate(pages);
    if (good) {
        load.pages_per_s = pages ? pages_per_s : 0;
        if (load.pages_per_s && !dirtying) {
            dirtying = true;
            start_thread(dirty_on, NULL);
        }
    }
    pthread_mutex_unlock(&guard);
    return good;
}

/* dirty [MIB MIB_PER_S]: no arguments only report; a rate of 0 keeps the memory filled and still. */
void cmd_dirty(const struct request *request) {
    uint64_t mib, rate;
    if (request->argc == 2 || (request->argc == 3 && (!parse_u64(request->argv[1], &mib) ||
                                                      !parse_u64(request->argv[2], &rate) || mib > 1 << 20 ||
                                                      rate > 1 << 20))) {
        refuse(request, "dirty MIB MIB_PER_S");
        return;
    }
    if (request->argc == 3 && !set_load(mib * 256, rate * 256)) {
        refuse(request, "not enough memory");
        return;
    }
    pthread_mutex_lock(&guard);
    answer(request, "{\"mib\":%llu,\"rate\":%llu,\"written_mib\":%llu}", (unsigned long long)load.pages / 256,
           (unsigned long long)load.pages_per_s / 256, (unsigned long long)load.written / 256);
    pthread_mutex_unlock(&guard);
}

static uint64_t tick_interval(void) {
    pthread_mutex_lock(&guard);
    uint64_t interval = tick_ns;
    if (interval == 0)
        ticking = false;
    pthread_mutex_unlock(&guard);
    return interval;
}

static void *tick_on(void *argument) {
    uint64_t next = now_ns(), interval;
    (void)argument;
    while ((interval = tick_interval()) > 0) {
        say("{\"tick\":%llu,\"ns\":%llu}", (unsigned long long)next_count(), (unsigned long long)now_ns());
        next += interval;
        if (next < now_ns())
            next = now_ns() + interval;
        sleep_until_ns(next);
    }
    return NULL;
}

/* ticks INTERVAL_MS: 0 ends them. A tick's number is taken from the one counter of this boot. */
void cmd_ticks(const struct request *request) {
    uint64_t milliseconds;
    if (!parse_u64(request->argv[1], &milliseconds) || milliseconds > 60000) {
        refuse(request, "INTERVAL_MS is 0 to 60000");
        return;
    }
    pthread_mutex_lock(&guard);
    tick_ns = milliseconds * 1000000ull;
    bool start = tick_ns && !ticking;
    if (start)
        ticking = true;
    pthread_mutex_unlock(&guard);
    answer(request, "{\"interval_ms\":%llu}", (unsigned long long)milliseconds);
    if (start)
        start_thread(tick_on, NULL);
}
