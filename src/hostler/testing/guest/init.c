/* The first and only process of the micro guest. Says its first word, loads the drivers, starts everything else.
 *
 * Kernel parameters: hl.ip=ADDRESS/PREFIX, hl.gw=GATEWAY, hl.beat=ADDRESS:PORT:INTERVAL_MS, hl.rescue (a shell on the
 * serial line instead of all this), hl.no-agent (no guest agent), hl.deaf (neither agent nor power button).
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

static char command_line[4096];

static void mount_all(void) {
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
}

/* The value of a kernel parameter; NULL where it is not given. The caller frees it. */
static char *parameter(const char *name) {
    size_t length = strlen(name);
    for (const char *at = command_line; (at = strstr(at, name)); at += length) {
        bool starts = at == command_line || at[-1] == ' ';
        if (starts && at[length] == '=')
            return strndup(at + length + 1, strcspn(at + length + 1, " "));
        if (starts && (at[length] == ' ' || at[length] == '\0'))
            return strdup("");
    }
    return NULL;
}

static void load_module(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
        say("HOSTLER-GUEST module %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static void load_modules(void) {
    char path[256];
    FILE *list = fopen("/modules.list", "re");
    while (list && fscanf(list, "%255s", path) == 1)
        load_module(path);
    if (list)
        fclose(list);
}

static void rescue(void) {
    int serial = open("/dev/ttyS0", O_RDWR);
    setsid();
    dup2(serial, 0);
    dup2(serial, 1);
    dup2(serial, 2);
    load_modules();
    execl("/bin/busybox", "sh", (char *)NULL);
}

static void configure_network(void) {
    char *address = parameter("hl.ip"), *gateway = parameter("hl.gw"), *beat = parameter("hl.beat");
    const char *problem = address ? net_configure(address, gateway) : NULL;
    char to[64];
    unsigned port, interval;
    if (problem)
        say("HOSTLER-GUEST network: %s", problem);
    if (beat && sscanf(beat, "%63[^:]:%u:%u", to, &port, &interval) == 3)
        net_beat(to, port, interval);
    free(address);
    free(gateway);
    free(beat);
}

/* Whoever asks the guest to shut down is heard, unless the guest was told to be deaf. */
static void listen_to_the_host(void) {
    char *deaf = parameter("hl.deaf"), *no_agent = parameter("hl.no-agent");
    if (!deaf)
        power_watch_button();
    if (!deaf && !no_agent)
        agent_serve();
    free(deaf);
    free(no_agent);
}

/* A young guest may have no random numbers yet, and its first word must not wait for them. */
static void choose_boot_id(void) {
    struct timespec clock;
    clock_gettime(CLOCK_REALTIME, &clock);
    if (getrandom(&boot_id, sizeof boot_id, GRND_NONBLOCK) != (ssize_t)sizeof boot_id)
        boot_id = mix64((uint64_t)clock.tv_sec, (uint64_t)clock.tv_nsec ^ now_ns());
}

int main(void) {
    mount_all();
    read_text("/proc/cmdline", command_line, sizeof command_line);
    if (parameter("hl.rescue"))
        rescue();
    signal(SIGPIPE, SIG_IGN);
    serial_open();
    say("HOSTLER-GUEST READY");
    choose_boot_id();
    disks_watch();
    load_modules();
    net_serve();
    configure_network();
    listen_to_the_host();
    serial_loop();
    return 0;
}
