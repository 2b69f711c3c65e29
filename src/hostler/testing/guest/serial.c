/* The serial line: requests "ID COMMAND ARGUMENT..." come in, one JSON line per answer goes out.
 *
 * A client that lost its connection (the VM moved) sends its request again with the same id: a request that was
 * answered is answered again from memory, one that still runs is not started twice.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "guest.h"

#define REMEMBERED 16

struct remembered {
    char id[40];
    char *text; /* NULL while the request still runs */
};

static int serial = -1;
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t remembering = PTHREAD_MUTEX_INITIALIZER;
static struct remembered memory[REMEMBERED];
static unsigned next_slot;

int serial_open(void) {
    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (serial < 0)
        return -1;
    struct termios settings;
    tcgetattr(serial, &settings);
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    settings.c_cflag |= CLOCAL | CREAD;
    tcsetattr(serial, TCSANOW, &settings);
    return 0;
}

static void write_all(const char *text, size_t length) {
    while (length > 0) {
        ssize_t wrote = write(serial, text, length);
        if (wrote <= 0)
            return; /* nobody can be told */
        text += wrote;
        length -= (size_t)wrote;
    }
}

static void say_line(const char *line) {
    pthread_mutex_lock(&writing);
    write_all(line, strlen(line));
    write_all("\n", 1);
    pthread_mutex_unlock(&writing);
}

void say(const char *format, ...) {
    char *line;
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(&line, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    say_line(line);
    free(line);
}

/* Takes over `line`. */
static void answer_line(const struct request *request, char *line) {
    say_line(line);
    pthread_mutex_lock(&remembering);
    for (unsigned i = 0; i < REMEMBERED; i++) {
        if (memory[i].text == NULL && strcmp(memory[i].id, request->id) == 0) {
            memory[i].text = line;
            line = NULL;
            break;
        }
    }
    pthread_mutex_unlock(&remembering);
    free(line);
}

static void answer_with(const struct request *request, bool ok, const char *format, va_list arguments) {
    char *body, *line;
    if (vasprintf(&body, format, arguments) < 0)
        return;
    if (!ok)
        json_clean(body);
    const char *shape = ok ? "{\"id\":\"%s\",\"ok\":true,\"result\":%s}" : "{\"id\":\"%s\",\"ok\":false,\"error\":\"%s\"}";
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    if (asprintf(&line, shape, request->id, body) >= 0)
        answer_line(request, line);
#pragma GCC diagnostic pop
    free(body);
}

void answer(const struct request *request, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    answer_with(request, true, format, arguments);
    va_end(arguments);
}

void refuse(const struct request *request, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    answer_with(request, false, format, arguments);
    va_end(arguments);
}

/* True when the id is known: then the answer, if there is one, was given again. */
static bool answer_again(const char *id) {
    char *line = NULL;
    bool known = false;
    pthread_mutex_lock(&remembering);
    for (unsigned i = 0; i < REMEMBERED && !known; i++) {
        if (strcmp(memory[i].id, id) == 0) {
            known = true;
            line = memory[i].text ? strdup(memory[i].text) : NULL;
        }
    }
    if (!known) {
        struct remembered *slot = &memory[next_slot++ % REMEMBERED];
        free(slot->text);
        slot->text = NULL;
        snprintf(slot->id, sizeof slot->id, "%s", id);
    }
    pthread_mutex_unlock(&remembering);
    if (line)
        say_line(line);
    free(line);
    return known;
}

static void *run_slow(void *argument) {
    struct request *request = argument;
    find_command(request->argv[0])->run(request);
    free(request);
    return NULL;
}

static bool split(struct request *request, const char *line) {
    char *rest, *save = NULL;
    snprintf(request->line, sizeof request->line, "%s", line);
    rest = strtok_r(request->line, " \t", &save);
    if (!rest || strlen(rest) >= sizeof request->id)
        return false;
    snprintf(request->id, sizeof request->id, "%s", rest);
    json_clean(request->id);
    while (request->argc < MAX_ARGS && (rest = strtok_r(NULL, " \t", &save)))
        request->argv[request->argc++] = rest;
    return request->argc > 0;
}

static void handle(const char *line) {
    struct request *request = calloc(1, sizeof *request);
    if (!request || !split(request, line)) {
        free(request);
        return; /* an empty line, or rubbish from before the line was ours */
    }
    const struct command *command = find_command(request->argv[0]);
    if (answer_again(request->id)) {
        free(request);
    } else if (!command) {
        refuse(request, "no such command: %s", request->argv[0]);
        free(request);
    } else if (request->argc - 1 < command->min_args || request->argc - 1 > command->max_args) {
        refuse(request, "%s takes %d to %d arguments", command->name, command->min_args, command->max_args);
        free(request);
    } else if (command->slow) {
        start_thread(run_slow, request);
    } else {
        command->run(request);
        free(request);
    }
}

void serial_loop(void) {
    char line[LINE_MAX_BYTES], chunk[LINE_MAX_BYTES];
    size_t length = 0;
    for (;;) {
        ssize_t got = read(serial, chunk, sizeof chunk);
        if (got <= 0) {
            sleep_until_ns(now_ns() + 10000000); /* a hung-up line: do not spin */
            continue;
        }
        for (ssize_t i = 0; i < got; i++) {
            if (chunk[i] == '\n' || chunk[i] == '\r') {
                line[length < sizeof line ? length : sizeof line - 1] = '\0';
                if (length < sizeof line)
                    handle(line);
                length = 0;
            } else {
                if (length < sizeof line)
                    line[length] = chunk[i];
                length++;
            }
        }
    }
}
