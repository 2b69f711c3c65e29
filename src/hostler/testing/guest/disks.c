/* What disks the guest sees, and word of each that comes or goes (from the kernel's uevents, without polling). */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <scsi/sg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

struct disk {
    char name[32], serial[80], wwn[80], vendor[40], model[80], hctl[80];
    uint64_t bytes;
    bool read_only, cdrom;
};

static void attribute(const char *disk, const char *path, char *buffer, size_t size) {
    char full[160];
    snprintf(full, sizeof full, "/sys/block/%.32s/%.64s", disk, path);
    read_text(full, buffer, size);
    json_clean(buffer);
}

/* SCSI: VPD page 80h is four bytes of header and the unit serial number. virtio-blk: a text of its own. */
static void serial_number(const char *disk, char *buffer, size_t size) {
    char path[80], page[256];
    snprintf(path, sizeof path, "/sys/block/%.32s/device/vpd_pg80", disk);
    ssize_t got = read_bytes(path, page, sizeof page);
    if (got < 4) {
        attribute(disk, "serial", buffer, size);
        return;
    }
    snprintf(buffer, size, "%.*s", (int)(got - 4), page + 4);
    json_clean(buffer);
}

static void scsi_address(const char *disk, char *buffer, size_t size) {
    char path[80], target[256];
    snprintf(path, sizeof path, "/sys/block/%.32s/device", disk);
    ssize_t got = readlink(path, target, sizeof target - 1);
    target[got > 0 ? got : 0] = '\0';
    const char *last = strrchr(target, '/');
    snprintf(buffer, size, "%s", last ? last + 1 : "");
    json_clean(buffer);
}

static bool describe(const char *name, struct disk *disk) {
    char number[32];
    memset(disk, 0, sizeof *disk);
    snprintf(disk->name, sizeof disk->name, "%.31s", name);
    attribute(name, "size", number, sizeof number);
    if (!parse_u64(number, &disk->bytes))
        return false;
    disk->bytes *= 512; /* sysfs counts in 512-byte sectors whatever the disk's own are */
    attribute(name, "ro", number, sizeof number);
    disk->read_only = strcmp(number, "1") == 0;
    disk->cdrom = strncmp(name, "sr", 2) == 0;
    serial_number(name, disk->serial, sizeof disk->serial);
    attribute(name, "device/wwid", disk->wwn, sizeof disk->wwn);
    attribute(name, "device/vendor", disk->vendor, sizeof disk->vendor);
    attribute(name, "device/model", disk->model, sizeof disk->model);
    scsi_address(name, disk->hctl, sizeof disk->hctl);
    return true;
}

static bool is_disk(const char *name) {
    return strncmp(name, "sd", 2) == 0 || strncmp(name, "vd", 2) == 0 || strncmp(name, "sr", 2) == 0;
}

static void print_disk(FILE *out, const struct disk *disk) {
    fprintf(out,
            "{\"name\":\"%s\",\"size\":%llu,\"serial\":\"%s\",\"wwn\":\"%s\",\"vendor\":\"%s\",\"model\":\"%s\","
            "\"hctl\":\"%s\",\"read_only\":%s,\"cdrom\":%s}",
            disk->name, (unsigned long long)disk->bytes, disk->serial, disk->wwn, disk->vendor, disk->model, disk->hctl,
            disk->read_only ? "true" : "false", disk->cdrom ? "true" : "false");
}

void cmd_disks(const struct request *request) {
    char *text = NULL;
    size_t size = 0;
    struct dirent *entry;
    struct disk disk;
    const char *separator = "";
    FILE *out = open_memstream(&text, &size);
    DIR *directory = opendir("/sys/block");
    fputc('[', out);
    while (directory && (entry = readdir(directory))) {
        if (is_disk(entry->d_name) && describe(entry->d_name, &disk)) {
            fputs(separator, out);
            print_disk(out, &disk);
            separator = ",";
        }
    }
    fputc(']', out);
    if (directory)
        closedir(directory);
    fclose(out);
    answer(request, "%s", text);
    free(text);
}

/* A disk by its name ("sda") or by its serial number. */
bool disk_find(const char *wanted, char *name, size_t size) {
    struct dirent *entry;
    struct disk disk;
    bool found = false;
    DIR *directory = opendir("/sys/block");
    while (directory && !found && (entry = readdir(directory))) {
        if (!is_disk(entry->d_name))
            continue;
        found = strcmp(entry->d_name, wanted) == 0 ||
                (describe(entry->d_name, &disk) && strcmp(disk.serial, wanted) == 0);
        if (found)
            snprintf(name, size, "%s", entry->d_name);
    }
    if (directory)
        closedir(directory);
    return found;
}

/* Opens past the page cache (O_DIRECT), so that what is read is what the disk has. -1: the request was refused. */
int disk_open(const struct request *request, const char *wanted, int flags, uint64_t *bytes) {
    char name[40], path[64];
    if (!disk_find(wanted, name, sizeof name)) {
        refuse(request, "no such disk: %s", wanted);
        return -1;
    }
    snprintf(path, sizeof path, "/dev/%s", name);
    int fd = open(path, flags | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, bytes) < 0) {
        refuse(request, "cannot open %s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

/* A disk that is held open, as if it were mounted: the kernel then locks the door of a CD drive. */
static int held = -1;

void cmd_release(const struct request *request) {
    if (held >= 0)
        close(held);
    held = -1;
    answer(request, "{}");
}

void cmd_hold(const struct request *request) {
    uint64_t bytes;
    int fd = held < 0 ? disk_open(request, request->argv[1], O_RDONLY, &bytes) : -1;
    if (held >= 0)
        refuse(request, "a disk is held already");
    else if (fd >= 0)
        answer(request, "{\"size\":%llu}", (unsigned long long)bytes);
    held = held < 0 ? fd : held;
}

/* PERSISTENT RESERVE OUT (SPC-3, 6.12). Not by the kernel's ioctl, which asks for reservations that survive a power
 * cut; not every target has these. 0, or what to say. */
static int reserve_out(int fd, unsigned char action, unsigned char type, uint64_t key, uint64_t new_key) {
    unsigned char command[10] = {0x5f, action, type, [8] = 24}, parameters[24] = {0}, sense[32];
    for (int i = 0; i < 8; i++) {
        parameters[i] = (unsigned char)(key >> (56 - 8 * i));
        parameters[8 + i] = (unsigned char)(new_key >> (56 - 8 * i));
    }
    struct sg_io_hdr io = {
        .interface_id = 'S',
        .dxfer_direction = SG_DXFER_TO_DEV,
        .cmd_len = sizeof command,
        .cmdp = command,
        .dxfer_len = sizeof parameters,
        .dxferp = parameters,
        .mx_sb_len = sizeof sense,
        .sbp = sense,
        .timeout = 10000,
    };
    return ioctl(fd, SG_IO, &io) < 0 ? -1 : io.status;
}

/* Register a key and reserve for writing (type 1: write exclusive); key 0 gives both up. */
void cmd_reserve(const struct request *request) {
    uint64_t bytes, key;
    if (!parse_u64(request->argv[2], &key)) {
        refuse(request, "KEY is a number");
        return;
    }
    int fd = disk_open(request, request->argv[1], O_RDWR, &bytes);
    if (fd < 0)
        return;
    int status = reserve_out(fd, 0x06, 0, 0, key);
    if (status == 0 && key != 0)
        status = reserve_out(fd, 0x01, 1, key, 0);
    if (status != 0)
        refuse(request, "SCSI status %d", status);
    else
        answer(request, "{}");
    close(fd);
}

static const char *field(const char *message, size_t length, const char *key) {
    for (const char *at = message; at < message + length; at += strlen(at) + 1)
        if (strncmp(at, key, strlen(key)) == 0)
            return at + strlen(key);
    return "";
}

static void tell(const char *message, size_t length) {
    const char *action = field(message, length, "ACTION=");
    const char *name = field(message, length, "DEVNAME=");
    struct disk disk;
    if (strcmp(field(message, length, "DEVTYPE="), "disk") != 0 || !is_disk(name))
        return;
    if (strcmp(action, "remove") == 0) {
        say("{\"event\":\"disk-removed\",\"ns\":%llu,\"disk\":{\"name\":\"%s\"}}", (unsigned long long)now_ns(), name);
    } else if (describe(name, &disk)) {
        char *text = NULL;
        size_t size = 0;
        FILE *out = open_memstream(&text, &size);
        print_disk(out, &disk);
        fclose(out);
        say("{\"event\":\"disk-%s\",\"ns\":%llu,\"disk\":%s}", strcmp(action, "add") == 0 ? "added" : "changed",
            (unsigned long long)now_ns(), text);
        free(text);
    }
}

static void *watch(void *argument) {
    int events = *(int *)argument;
    char message[8192];
    for (;;) {
        ssize_t got = recv(events, message, sizeof message - 1, 0);
        if (got > 0) {
            message[got] = '\0';
            tell(message, (size_t)got);
        }
    }
    return NULL;
}

void disks_watch(void) {
    static int events;
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int room = 1 << 20; /* a burst of hot adds must not overflow it */
    events = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    setsockopt(events, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (events >= 0 && bind(events, (struct sockaddr *)&kernel, sizeof kernel) == 0)
        start_thread(watch, &events);
}
