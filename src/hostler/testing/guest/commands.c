/* The commands of the serial line, and the few that need no file of their own. */
#include <stdio.h>
#include <string.h>
#include <sys/sysinfo.h>

#include "guest.h"

static void cmd_ping(const struct request *request) {
    answer(request, "{\"count\":%llu,\"boot\":\"%016llx\"}", (unsigned long long)next_count(),
           (unsigned long long)boot_id);
}

static void cmd_uptime(const struct request *request) {
    answer(request, "{\"ns\":%llu,\"boot\":\"%016llx\"}", (unsigned long long)now_ns(), (unsigned long long)boot_id);
}

static void cmd_mem(const struct request *request) {
    struct sysinfo info;
    sysinfo(&info);
    answer(request, "{\"total\":%llu,\"free\":%llu,\"cpus\":%d}", (unsigned long long)info.totalram * info.mem_unit,
           (unsigned long long)info.freeram * info.mem_unit, get_nprocs());
}

/* A file of /sys or /proc, for what the kernel found: firmware, TPM, processors. */
static void cmd_look(const struct request *request) {
    char text[400];
    if (!read_text(request->argv[1], text, sizeof text)) {
        refuse(request, "%s cannot be read", request->argv[1]);
        return;
    }
    json_clean(text);
    answer(request, "\"%s\"", text);
}

static const struct command commands[] = {
    {"ping", 0, 0, false, cmd_ping},
    {"uptime", 0, 0, false, cmd_uptime},
    {"mem", 0, 0, false, cmd_mem},
    {"look", 1, 1, false, cmd_look},
    {"disks", 0, 0, false, cmd_disks},
    {"reserve", 2, 2, false, cmd_reserve},
    {"hold", 1, 1, false, cmd_hold},
    {"release", 0, 0, false, cmd_release},
    {"write", 3, 4, true, cmd_write},
    {"verify", 3, 4, true, cmd_verify},
    {"io", 6, 6, true, cmd_io},
    {"pattern-start", 2, 4, false, cmd_pattern_start},
    {"pattern-stop", 0, 0, true, cmd_pattern_stop},
    {"pattern-status", 0, 0, false, cmd_pattern_status},
    {"pattern-verify", 2, 4, true, cmd_pattern_verify},
    {"dirty", 0, 2, true, cmd_dirty},
    {"ticks", 1, 1, false, cmd_ticks},
    {"ip", 1, 2, false, cmd_ip},
    {"mac", 0, 0, false, cmd_mac},
    {"beat", 3, 3, false, cmd_beat},
    {"poweroff", 0, 0, false, cmd_poweroff},
    {"reboot", 0, 0, false, cmd_reboot},
};

const struct command *find_command(const char *name) {
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}
