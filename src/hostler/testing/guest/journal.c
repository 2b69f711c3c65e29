/* The journal: a thread that writes numbered blocks round and round a range of a disk, each flushed before the next,
 * and knows the last number the disk acknowledged. Reading back tells
 *   lost     a block whose acknowledged write is not on the disk,
 *   torn     a block that is no whole block of its slot,
 *   foreign  a block with the right number that this guest did not write: a second running copy of it did.
 *
 * Block n lies in slot n % slots. Words: magic, seed, number, stamp (the guest's clock), then mix64(seed ^ mix64(number,
 * stamp), i) for word i up to 511. hostler.testing.patterns checks the same from outside.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define BLOCK 4096u
#define WORDS (BLOCK / 8)
#define MAGIC 0x484f53544c45524aull /* "HOSTLERJ" */
#define DEFAULT_SLOTS 1024u
#define MAX_SLOTS 65536u
#define BREATH_NS 1000000ull /* between two writes, so that the guest has time for anything else */

struct journal {
    int fd, error;
    bool running, stop;
    uint64_t seed, slots, acked, report_ms;
    uint64_t *stamps;
    char disk[40];
    pthread_t thread;
};

static struct journal journal = {.fd = -1};
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static void fill_block(uint64_t *words, uint64_t seed, uint64_t number, uint64_t stamp) {
    words[0] = MAGIC;
    words[1] = seed;
    words[2] = number;
    words[3] = stamp;
    for (unsigned i = 4; i < WORDS; i++)
        words[i] = mix64(seed ^ mix64(number, stamp), i);
}

static bool whole_block(const uint64_t *words, uint64_t seed) {
    if (words[0] != MAGIC || words[1] != seed)
        return false;
    for (unsigned i = 4; i < WORDS; i++)
        if (words[i] != mix64(seed ^ mix64(words[2], words[3]), i))
            return false;
    return true;
}

/* Writes block `number`; 0 or an errno. */
static int write_block(uint64_t *buffer, uint64_t number) {
    uint64_t slot = number % journal.slots, stamp = now_ns();
    fill_block(buffer, journal.seed, number, stamp);
    ssize_t wrote = pwrite(journal.fd, buffer, BLOCK, (off_t)(slot * BLOCK));
    if (wrote != (ssize_t)BLOCK)
        return wrote < 0 ? errno : EIO;
    if (fdatasync(journal.fd) < 0)
        return errno;
    journal.stamps[slot] = stamp;
    return 0;
}

/* Held while a block is written, and by who has frozen the guest: nothing is on its way to the disk then. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

void journal_freeze(bool frozen) {
    if (frozen)
        pthread_mutex_lock(&gate);
    else
        pthread_mutex_unlock(&gate);
}

static bool told_to_stop(void) {
    pthread_mutex_lock(&guard);
    bool stop = journal.stop;
    pthread_mutex_unlock(&guard);
    return stop;
}

static void *write_on(void *argument) {
    uint64_t *buffer = argument, next_report = now_ns();
    for (uint64_t number = 1; !told_to_stop(); number++) {
        pthread_mutex_lock(&gate);
        int error = write_block(buffer, number);
        pthread_mutex_unlock(&gate);
        pthread_mutex_lock(&guard);
        journal.error = error;
        if (!error)
            journal.acked = number;
        pthread_mutex_unlock(&guard);
        if (error) {
            say("{\"event\":\"pattern-failed\",\"number\":%llu,\"errno\":%d}", (unsigned long long)number, error);
            break;
        }
        if (journal.report_ms && now_ns() >= next_report) {
            say("{\"event\":\"pattern\",\"acked\":%llu}", (unsigned long long)number);
            next_report = now_ns() + journal.report_ms * 1000000ull;
        }
        sleep_until_ns(now_ns() + BREATH_NS);
    }
    free(buffer);
    return NULL;
}

static bool choose_slots(const struct request *request, uint64_t disk_bytes, uint64_t *slots) {
    uint64_t span = (uint64_t)DEFAULT_SLOTS * BLOCK;
    bool given = request->argc > 3;
    if (given && (!parse_u64(request->argv[3], &span) || span % BLOCK)) {
        refuse(request, "SPAN is a multiple of %u bytes", BLOCK);
        return false;
    }
    if (!given && span > disk_bytes)
        span = disk_bytes;
    *slots = span / BLOCK;
    if (*slots == 0 || *slots > MAX_SLOTS || span > disk_bytes) {
        refuse(request, "SPAN must fit the disk and hold 1 to %u blocks", MAX_SLOTS);
        return false;
    }
    return true;
}

static bool start(const struct request *request, int fd, uint64_t disk_bytes) {
    uint64_t seed, slots, report_ms = 0;
    void *buffer = NULL;
    if (!parse_u64(request->argv[2], &seed) || (request->argc > 4 && !parse_u64(request->argv[4], &report_ms))) {
        refuse(request, "SEED and REPORT_MS are numbers");
        return false;
    }
    if (!choose_slots(request, disk_bytes, &slots))
        return false;
    uint64_t *stamps = calloc(slots, sizeof *stamps);
    if (!stamps || posix_memalign(&buffer, BLOCK, BLOCK) != 0) {
        free(stamps);
        refuse(request, "out of memory");
        return false;
    }
    free(journal.stamps);
    journal = (struct journal){.fd = fd, .seed = seed, .slots = slots, .report_ms = report_ms, .stamps = stamps};
    strncpy(journal.disk, request->argv[1], sizeof journal.disk - 1);
    journal.running = pthread_create(&journal.thread, NULL, write_on, buffer) == 0;
    answer(request, "{\"slots\":%llu}", (unsigned long long)slots);
    return true;
}

void cmd_pattern_start(const struct request *request) {
    uint64_t bytes;
    if (journal.running) {
        refuse(request, "a pattern runs already");
        return;
    }
    int fd = disk_open(request, request->argv[1], O_RDWR, &bytes);
    if (fd >= 0 && !start(request, fd, bytes))
        close(fd);
}

/* Ends the writing; the last acknowledged number. */
uint64_t journal_stop(void) {
    if (journal.running) {
        pthread_mutex_lock(&guard);
        journal.stop = true;
        pthread_mutex_unlock(&guard);
        pthread_join(journal.thread, NULL);
        journal.running = false;
        close(journal.fd);
        journal.fd = -1;
    }
    return journal.acked;
}

void cmd_pattern_stop(const struct request *request) {
    uint64_t acked = journal_stop();
    answer(request, "{\"acked\":%llu,\"errno\":%d}", (unsigned long long)acked, journal.error);
}

void cmd_pattern_status(const struct request *request) {
    pthread_mutex_lock(&guard);
    uint64_t acked = journal.acked;
    int error = journal.error;
    pthread_mutex_unlock(&guard);
    answer(request, "{\"running\":%s,\"acked\":%llu,\"errno\":%d}", journal.running ? "true" : "false",
           (unsigned long long)acked, error);
}

struct verdict {
    uint64_t checked, lost, torn, foreign, unreadable, newest;
};

/* The newest acknowledged number that belongs into a slot; 0: the slot was never written. */
static uint64_t expected_in(uint64_t slot, uint64_t slots, uint64_t acked) {
    if (acked < slot)
        return 0;
    return acked - (acked - slot) % slots;
}

static void judge(struct verdict *verdict, const uint64_t *words, uint64_t seed, uint64_t slot, uint64_t slots,
                  uint64_t acked, const uint64_t *stamps) {
    uint64_t expected = expected_in(slot, slots, acked);
    bool in_flight = (acked + 1) % slots == slot; /* the write that was never acknowledged may be there or not */
    verdict->checked++;
    if (!whole_block(words, seed) || words[2] % slots != slot) {
        if (!in_flight)
            verdict->torn++;
        return;
    }
    if (words[2] > verdict->newest)
        verdict->newest = words[2];
    if (words[2] < expected)
        verdict->lost++;
    else if (stamps && words[2] == expected && words[3] != stamps[slot])
        verdict->foreign++;
    else if (stamps && words[2] > acked + 1)
        verdict->foreign++;
}

static void verify(const struct request *request, int fd, uint64_t *buffer, uint64_t seed, uint64_t slots,
                   uint64_t acked, const uint64_t *stamps) {
    struct verdict verdict = {0};
    for (uint64_t slot = 0; slot < slots; slot++) {
        if (expected_in(slot, slots, acked) == 0)
            continue;
        if (pread(fd, buffer, BLOCK, (off_t)(slot * BLOCK)) != (ssize_t)BLOCK)
            verdict.unreadable++;
        else
            judge(&verdict, buffer, seed, slot, slots, acked, stamps);
    }
    answer(request,
           "{\"acked\":%llu,\"checked\":%llu,\"lost\":%llu,\"torn\":%llu,\"foreign\":%llu,\"unreadable\":%llu,"
           "\"newest\":%llu}",
           (unsigned long long)acked, (unsigned long long)verdict.checked, (unsigned long long)verdict.lost,
           (unsigned long long)verdict.torn, (unsigned long long)verdict.foreign,
           (unsigned long long)verdict.unreadable, (unsigned long long)verdict.newest);
}

/* pattern-verify DISK SEED [SPAN [ACKED]]: with ACKED, the number comes from outside (this guest is a new boot). */
void cmd_pattern_verify(const struct request *request) {
    uint64_t seed, bytes, slots, acked = journal.acked;
    void *buffer = NULL;
    bool outside = request->argc > 4;
    if (journal.running || !parse_u64(request->argv[2], &seed) || (outside && !parse_u64(request->argv[4], &acked))) {
        refuse(request, journal.running ? "stop the pattern first" : "SEED and ACKED are numbers");
        return;
    }
    int fd = disk_open(request, request->argv[1], O_RDONLY, &bytes);
    if (fd < 0)
        return;
    if (!outside && request->argc < 4 && journal.slots)
        slots = journal.slots;
    else if (!choose_slots(request, bytes, &slots)) {
        close(fd);
        return;
    }
    bool ours = !outside && journal.stamps && journal.seed == seed && journal.slots == slots;
    if (posix_memalign(&buffer, BLOCK, BLOCK) == 0)
        verify(request, fd, buffer, seed, slots, acked, ours ? journal.stamps : NULL);
    else
        refuse(request, "out of memory");
    free(buffer);
    close(fd);
}
