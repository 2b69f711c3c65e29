/* How fast a disk is: DEPTH threads, each with one request under way, past the page cache, for so many milliseconds.
 * "seq" goes through the disk from its beginning, all threads together; "rand" asks for blocks anywhere on it. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define MAX_DEPTH 32u
#define MAX_BLOCK (4u << 20)
#define MAX_MS 60000u

struct io {
    int fd;
    bool writes, random;
    uint64_t block, blocks, until;
    atomic_ullong next, done;
    atomic_int failed;
};

static void *work(void *argument) {
    struct io *io = argument;
    void *buffer = NULL;
    if (posix_memalign(&buffer, 4096, io->block) != 0) {
        atomic_store(&io->failed, ENOMEM);
        return NULL;
    }
    memset(buffer, 0x5a, io->block);
    while (now_ns() < io->until && atomic_load(&io->failed) == 0) {
        uint64_t number = atomic_fetch_add(&io->next, 1);
        uint64_t at = (io->random ? mix64(17, number) : number) % io->blocks * io->block;
        ssize_t moved = io->writes ? pwrite(io->fd, buffer, io->block, (off_t)at)
                                   : pread(io->fd, buffer, io->block, (off_t)at);
        if (moved != (ssize_t)io->block)
            atomic_store(&io->failed, moved < 0 ? errno : EIO);
        else
            atomic_fetch_add(&io->done, 1);
    }
    free(buffer);
    return NULL;
}

static void measure(const struct request *request, struct io *io, uint64_t depth, uint64_t ms) {
    pthread_t threads[MAX_DEPTH];
    uint64_t begun = now_ns(), started = 0;
    io->until = begun + ms * 1000000ull;
    while (started < depth && pthread_create(&threads[started], NULL, work, io) == 0)
        started++;
    for (uint64_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    if (io->writes && fsync(io->fd) < 0)
        atomic_store(&io->failed, errno);
    uint64_t took = now_ns() - begun;
    if (started < depth || atomic_load(&io->failed) != 0)
        refuse(request, "failed: %s", strerror(started < depth ? EAGAIN : atomic_load(&io->failed)));
    else
        answer(request, "{\"requests\":%llu,\"bytes\":%llu,\"ns\":%llu}", (unsigned long long)atomic_load(&io->done),
               (unsigned long long)(atomic_load(&io->done) * io->block), (unsigned long long)took);
}

void cmd_io(const struct request *request) {
    struct io io = {0};
    uint64_t size, depth, ms;
    io.writes = strcmp(request->argv[2], "write") == 0;
    io.random = strcmp(request->argv[3], "rand") == 0;
    if (!parse_u64(request->argv[4], &io.block) || !parse_u64(request->argv[5], &depth) ||
        !parse_u64(request->argv[6], &ms) || io.block == 0 || io.block % 512 != 0 || io.block > MAX_BLOCK ||
        depth == 0 || depth > MAX_DEPTH || ms > MAX_MS) {
        refuse(request, "DISK read|write rand|seq BLOCK DEPTH MS: BLOCK a multiple of 512 up to 4 MiB, DEPTH up to 32");
        return;
    }
    io.fd = disk_open(request, request->argv[1], io.writes ? O_RDWR : O_RDONLY, &size);
    if (io.fd < 0)
        return;
    io.blocks = size / io.block;
    if (io.blocks == 0)
        refuse(request, "the disk has only %llu bytes", (unsigned long long)size);
    else
        measure(request, &io, depth, ms);
    close(io.fd);
}
