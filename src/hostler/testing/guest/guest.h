/* The micro guest: one static program that is the whole user space of a test VM.
 *
 * Each file below holds one thing the guest can do; init.c starts them. Everything it says on the serial line is one
 * whole line: an answer {"id":..,"ok":..}, an event {"event":..}, a tick {"tick":..} or a word HOSTLER-GUEST ....
 */
#ifndef HOSTLER_GUEST_H
#define HOSTLER_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_ARGS 8
#define LINE_MAX_BYTES 512

struct request {
    char id[40];
    char line[LINE_MAX_BYTES];
    int argc;
    char *argv[MAX_ARGS];
};

/* util.c */
extern uint64_t boot_id;
uint64_t now_ns(void);
void sleep_until_ns(uint64_t deadline);
uint64_t mix64(uint64_t seed, uint64_t index);
bool parse_u64(const char *text, uint64_t *value);
bool read_text(const char *path, char *buffer, size_t size);
ssize_t read_bytes(const char *path, void *buffer, size_t size);
void json_clean(char *text);
void start_thread(void *(*body)(void *), void *argument);

/* serial.c */
int serial_open(void);
void serial_loop(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void answer(const struct request *request, const char *format, ...) __attribute__((format(printf, 2, 3)));
void refuse(const struct request *request, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* commands.c */
struct command {
    const char *name;
    int min_args, max_args;
    bool slow; /* runs in its own thread, so that pings are answered meanwhile */
    void (*run)(const struct request *request);
};
const struct command *find_command(const char *name);

/* disks.c */
bool disk_find(const char *wanted, char *name, size_t size);
int disk_open(const struct request *request, const char *wanted, int flags, uint64_t *bytes);
void disks_watch(void);
void cmd_disks(const struct request *request);
void cmd_reserve(const struct request *request);
void cmd_hold(const struct request *request);
void cmd_release(const struct request *request);

/* pattern.c */
void cmd_write(const struct request *request);
void cmd_verify(const struct request *request);

/* io.c */
void cmd_io(const struct request *request);

/* journal.c */
void cmd_pattern_start(const struct request *request);
void cmd_pattern_stop(const struct request *request);
void cmd_pattern_status(const struct request *request);
void cmd_pattern_verify(const struct request *request);
uint64_t journal_stop(void);
void journal_freeze(bool frozen);

/* load.c */
void cmd_dirty(const struct request *request);
void cmd_ticks(const struct request *request);

/* net.c */
uint64_t next_count(void);
const char *net_configure(const char *address, const char *gateway);
void net_serve(void);
void net_beat(const char *address, uint64_t port, uint64_t interval_ms);
void cmd_ip(const struct request *request);
void cmd_mac(const struct request *request);
void cmd_beat(const struct request *request);

/* agent.c */
void agent_serve(void);

/* power.c */
void power_watch_button(void);
void power_off(const char *why);
void cmd_poweroff(const struct request *request);
void cmd_reboot(const struct request *request);

#endif
