/* Write and verify: a range of a disk filled from a seed. The word at byte offset o is mix64(seed, o / 8), so any part
 * can be checked alone, here or from outside. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define CHUNK (1u << 20)
#define SECTOR 512u

struct range {
    uint64_t seed, bytes, offset;
};

static bool parse_range(const struct request *request, struct range *range) {
    range->offset = 0;
    bool good = parse_u64(request->argv[2], &range->seed) && parse_u64(request->argv[3], &range->bytes) &&
                (request->argc < 5 || parse_u64(request->argv[4], &range->offset));
    if (!good || range->bytes == 0 || (range->bytes | range->offset) % SECTOR != 0) {
        refuse(request, "SEED BYTES [OFFSET] are numbers, BYTES and OFFSET multiples of 512");
        return false;
    }
    return true;
}

static bool fits(const struct request *request, const struct range *range, uint64_t size) {
    if (range->offset <= size && range->bytes <= size - range->offset)
        return true;
    refuse(request, "the disk has only %llu bytes", (unsigned long long)size);
    return false;
}

static void fill(uint64_t *words, size_t bytes, uint64_t seed, uint64_t offset) {
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = mix64(seed, offset / 8 + i);
}

static uint64_t bad_sectors(const uint64_t *words, size_t bytes, uint64_t seed, uint64_t offset, int64_t *first) {
    uint64_t bad = 0;
    for (size_t sector = 0; sector < bytes; sector += SECTOR) {
        for (size_t i = sector / 8; i < (sector + SECTOR) / 8; i++) {
            if (words[i] != mix64(seed, offset / 8 + i)) {
                if (*first < 0)
                    *first = (int64_t)(offset + sector);
                bad++;
                break;
            }
        }
    }
    return bad;
}

static size_t piece(const struct range *range, uint64_t done) {
    return range->bytes - done < CHUNK ? (size_t)(range->bytes - done) : CHUNK;
}

static void write_range(const struct request *request, int fd, uint64_t *buffer, const struct range *range) {
    for (uint64_t done = 0; done < range->bytes;) {
        size_t want = piece(range, done);
        fill(buffer, want, range->seed, range->offset + done);
        ssize_t wrote = pwrite(fd, buffer, want, (off_t)(range->offset + done));
        if (wrote != (ssize_t)want) {
            refuse(request, "write failed at %llu: %s", (unsigned long long)(range->offset + done),
                   wrote < 0 ? strerror(errno) : "short write");
            return;
        }
        done += want;
    }
    if (fsync(fd) < 0)
        refuse(request, "fsync failed: %s", strerror(errno));
    else
        answer(request, "{\"bytes\":%llu}", (unsigned long long)range->bytes);
}

static void verify_range(const struct request *request, int fd, uint64_t *buffer, const struct range *range) {
    uint64_t bad = 0;
    int64_t first = -1;
    for (uint64_t done = 0; done < range->bytes;) {
        size_t want = piece(range, done);
        ssize_t got = pread(fd, buffer, want, (off_t)(range->offset + done));
        if (got != (ssize_t)want) {
            refuse(request, "read failed at %llu: %s", (unsigned long long)(range->offset + done),
                   got < 0 ? strerror(errno) : "short read");
            return;
        }
        bad += bad_sectors(buffer, want, range->seed, range->offset + done, &first);
        done += want;
    }
    answer(request, "{\"bytes\":%llu,\"bad_sectors\":%llu,\"first_bad\":%lld}", (unsigned long long)range->bytes,
           (unsigned long long)bad, (long long)first);
}

typedef void (*ranged)(const struct request *, int, uint64_t *, const struct range *);

static void with_range(const struct request *request, int flags, ranged run) {
    struct range range;
    uint64_t size;
    void *buffer = NULL;
    if (!parse_range(request, &range))
        return;
    int fd = disk_open(request, request->argv[1], flags, &size);
    if (fd < 0)
        return;
    if (posix_memalign(&buffer, 4096, CHUNK) != 0)
        refuse(request, "out of memory");
    else if (fits(request, &range, size))
        run(request, fd, buffer, &range);
    free(buffer);
    close(fd);
}

void cmd_write(const struct request *request) { with_range(request, O_RDWR, write_range); }

void cmd_verify(const struct request *request) { with_range(request, O_RDONLY, verify_range); }
