/* The power button (an input device made by the kernel's ACPI button driver), switching off, rebooting. */
#include <dirent.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "guest.h"

static void settle(void) {
    journal_stop();
    sync();
}

void power_off(const char *why) {
    settle();
    say("HOSTLER-GUEST POWEROFF %s", why);
    reboot(RB_POWER_OFF);
}

void cmd_poweroff(const struct request *request) {
    answer(request, "{}");
    power_off("command");
}

void cmd_reboot(const struct request *request) {
    if (request)
        answer(request, "{}");
    settle();
    say("HOSTLER-GUEST REBOOT");
    reboot(RB_AUTOBOOT);
}

static void *watch(void *argument) {
    int button = (int)(intptr_t)argument;
    struct input_event event;
    while (read(button, &event, sizeof event) == (ssize_t)sizeof event)
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
            power_off("button");
    return NULL;
}

static bool has_power_key(int fd) {
    unsigned char keys[KEY_MAX / 8 + 1] = {0};
    return ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 && (keys[KEY_POWER / 8] >> (KEY_POWER % 8) & 1);
}

void power_watch_button(void) {
    char path[300];
    struct dirent *entry;
    DIR *directory = opendir("/dev/input");
    while (directory && (entry = readdir(directory))) {
        snprintf(path, sizeof path, "/dev/input/%s", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && has_power_key(fd))
            start_thread(watch, (void *)(intptr_t)fd);
        else if (fd >= 0)
            close(fd);
    }
    if (directory)
        closedir(directory);
}
