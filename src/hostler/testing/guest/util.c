/* Small helpers that every part needs: clocks, numbers, files, threads. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

uint64_t boot_id; /* random, made once per boot: tells a rebooted guest from one that went on */

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void sleep_until_ns(uint64_t deadline) {
    struct timespec until = {.tv_sec = (time_t)(deadline / 1000000000ull), .tv_nsec = (long)(deadline % 1000000000ull)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        continue;
}

/* The index-th word of the sequence of a seed: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), which allows random
 * access. The outside computes the same in hostler.testing.patterns. */
uint64_t mix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

bool parse_u64(const char *text, uint64_t *value) {
    char *end;
    if (!isdigit((unsigned char)text[0]))
        return false;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return errno == 0 && *end == '\0';
}

ssize_t read_bytes(const char *path, void *buffer, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t got = read(fd, buffer, size);
    close(fd);
    return got;
}

/* The text of a small file without white space at its end; "" and false where it cannot be read. */
bool read_text(const char *path, char *buffer, size_t size) {
    ssize_t got = read_bytes(path, buffer, size - 1);
    buffer[got > 0 ? got : 0] = '\0';
    for (char *end = buffer + strlen(buffer); end > buffer && isspace((unsigned char)end[-1]); end--)
        end[-1] = '\0';
    return got >= 0;
}

/* Make a text safe between JSON quotes: what a device says of itself is not to be trusted. */
void json_clean(char *text) {
    size_t length = 0;
    for (char *c = text; *c; c++) {
        if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
            *c = '?';
        if (*c != ' ')
            length = (size_t)(c - text) + 1;
    }
    text[length] = '\0';
}

void start_thread(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument) == 0)
        pthread_detach(thread);
    else
        say("HOSTLER-GUEST out of threads");
}
