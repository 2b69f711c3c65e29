/* A small guest agent on the port org.qemu.guest_agent.0: enough of QEMU's guest agent protocol (docs/interop/qemu-ga-ref)
 * for a real client: sync, ping, info, osinfo, shutdown, and freezing. This guest has no file systems; what stands still
 * while it is frozen is the journal. */
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define PORT_NAME "org.qemu.guest_agent.0"
#define COMMANDS_INFO                                                                                                 \
    "{\"return\":{\"version\":\"7.2.0\",\"supported_commands\":["                                                     \
    "{\"name\":\"guest-sync-delimited\",\"enabled\":true,\"success-response\":true},"                                 \
    "{\"name\":\"guest-sync\",\"enabled\":true,\"success-response\":true},"                                           \
    "{\"name\":\"guest-ping\",\"enabled\":true,\"success-response\":true},"                                           \
    "{\"name\":\"guest-info\",\"enabled\":true,\"success-response\":true},"                                           \
    "{\"name\":\"guest-get-osinfo\",\"enabled\":true,\"success-response\":true},"                                     \
    "{\"name\":\"guest-fsfreeze-status\",\"enabled\":true,\"success-response\":true},"                                \
    "{\"name\":\"guest-fsfreeze-freeze\",\"enabled\":true,\"success-response\":true},"                                \
    "{\"name\":\"guest-fsfreeze-thaw\",\"enabled\":true,\"success-response\":true},"                                  \
    "{\"name\":\"guest-shutdown\",\"enabled\":true,\"success-response\":false}]}}"

static void reply(int port, const char *text) {
    dprintf(port, "%s\n", text);
}

/* The text after "key": in a message; this is no JSON parser, only enough for what QEMU's clients send. */
static const char *value_of(const char *message, const char *key) {
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *at = strstr(message, quoted);
    if (!at)
        return "";
    at += strlen(quoted);
    return at + strspn(at, " \t:");
}

static bool is_text(const char *value, const char *wanted) {
    size_t length = strlen(wanted);
    return value[0] == '"' && strncmp(value + 1, wanted, length) == 0 && value[length + 1] == '"';
}

static void sync_reply(int port, const char *message, bool delimited) {
    char line[80];
    const char *id = value_of(message, "id");
    snprintf(line, sizeof line, "%s{\"return\":%.*s}", delimited ? "\xff" : "", (int)strspn(id, "-0123456789"), id);
    reply(port, line);
}

static void shut_down(const char *message) {
    const char *mode = value_of(message, "mode");
    if (is_text(mode, "reboot"))
        cmd_reboot(NULL);
    power_off("guest agent");
}

static bool frozen;

static void freeze(int port, bool wanted) {
    char line[40];
    if (wanted != frozen)
        journal_freeze(wanted);
    snprintf(line, sizeof line, "{\"return\":%d}", wanted != frozen);
    frozen = wanted;
    reply(port, line);
}

static void tell_frozen(int port) {
    reply(port, frozen ? "{\"return\":\"frozen\"}" : "{\"return\":\"thawed\"}");
}

static void obey(int port, const char *message) {
    const char *command = value_of(message, "execute");
    if (is_text(command, "guest-sync-delimited"))
        sync_reply(port, message, true);
    else if (is_text(command, "guest-sync"))
        sync_reply(port, message, false);
    else if (is_text(command, "guest-ping"))
        reply(port, "{\"return\":{}}");
    else if (is_text(command, "guest-info"))
        reply(port, COMMANDS_INFO);
    else if (is_text(command, "guest-get-osinfo"))
        reply(port, "{\"return\":{\"id\":\"hostler-micro-guest\",\"name\":\"Hostler micro guest\"}}");
    else if (is_text(command, "guest-fsfreeze-status"))
        tell_frozen(port);
    else if (is_text(command, "guest-fsfreeze-freeze"))
        freeze(port, true);
    else if (is_text(command, "guest-fsfreeze-thaw"))
        freeze(port, false);
    else if (is_text(command, "guest-shutdown"))
        shut_down(message);
    else if (*command)
        reply(port, "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"not in the micro guest\"}}");
    else
        reply(port, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no command in this message\"}}");
}

static void serve(int port) {
    char line[2048];
    size_t length = 0;
    for (;;) {
        unsigned char byte;
        struct pollfd ready = {.fd = port, .events = POLLIN};
        poll(&ready, 1, -1);
        if (read(port, &byte, 1) != 1) {
            sleep_until_ns(now_ns() + 50000000); /* nobody is connected on the host: the port reads as ended */
            length = 0;
        } else if (byte == 0xff) {
            length = 0; /* a client's sign to forget what came before */
        } else if (byte == '\n') {
            line[length] = '\0';
            if (length > 0)
                obey(port, line);
            length = 0;
        } else if (length < sizeof line - 1) {
            line[length++] = (char)byte;
        }
    }
}

static int open_port(void) {
    char path[300], name[64];
    struct dirent *entry;
    int port = -1;
    DIR *directory = opendir("/sys/class/virtio-ports");
    while (directory && port < 0 && (entry = readdir(directory))) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (!read_text(path, name, sizeof name) || strcmp(name, PORT_NAME) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        port = open(path, O_RDWR | O_CLOEXEC);
    }
    if (directory)
        closedir(directory);
    return port;
}

static void *agent(void *argument) {
    (void)argument;
    int port = -1;
    /* The ports come a moment after their module, told by control messages of the host. Ten seconds are plenty. */
    for (int tries = 0; tries < 200 && port < 0; tries++) {
        port = open_port();
        if (port < 0)
            sleep_until_ns(now_ns() + 50000000);
    }
    if (port >= 0)
        serve(port);
    return NULL;
}

void agent_serve(void) { start_thread(agent, NULL); }
