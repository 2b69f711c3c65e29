/* The network: an address, an echo over UDP (port 7007) and TCP (port 7008), and beats sent to an observer.
 *
 * Request: sequence number and sender's time, two 64-bit words in network order. Answer: the same two, then the guest's
 * counter (grows with every answer, tick and beat since boot), its monotonic clock in ns, and its boot id. Beats have the
 * shape of an answer with their own sequence number; whatever comes back for a beat is counted.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/tcp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "guest.h"

#define UDP_PORT 7007
#define TCP_PORT 7008

struct frame {
    uint64_t sequence, time, count, clock, boot;
};
#define REQUEST_BYTES 16

static _Atomic uint64_t counter;
static _Atomic uint64_t beats_sent, beats_answered, beat_interval_ns;
static struct sockaddr_in beat_to;
static atomic_bool beating;

uint64_t next_count(void) { return atomic_fetch_add(&counter, 1) + 1; }

static void stamp(struct frame *frame) {
    frame->count = htobe64(next_count());
    frame->clock = htobe64(now_ns());
    frame->boot = htobe64(boot_id);
}

static bool link_up(int control, const char *name) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (ioctl(control, SIOCGIFFLAGS, &request) < 0)
        return false;
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    return ioctl(control, SIOCSIFFLAGS, &request) == 0;
}

static bool set_address(int control, unsigned long what, struct in_addr address) {
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *value = (struct sockaddr_in *)&request.ifr_addr;
    value->sin_family = AF_INET;
    value->sin_addr = address;
    return ioctl(control, what, &request) == 0;
}

static bool set_gateway(int control, struct in_addr gateway) {
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    ((struct sockaddr_in *)&route.rt_dst)->sin_family = AF_INET;
    ((struct sockaddr_in *)&route.rt_genmask)->sin_family = AF_INET;
    struct sockaddr_in *via = (struct sockaddr_in *)&route.rt_gateway;
    via->sin_family = AF_INET;
    via->sin_addr = gateway;
    return ioctl(control, SIOCADDRT, &route) == 0 || errno == EEXIST;
}

/* "10.0.0.2/24" to address and mask. */
static bool parse_address(const char *text, struct in_addr *address, struct in_addr *mask) {
    char plain[32];
    uint64_t prefix;
    snprintf(plain, sizeof plain, "%s", text);
    char *slash = strchr(plain, '/');
    if (!slash || !parse_u64(slash + 1, &prefix) || prefix > 32)
        return false;
    *slash = '\0';
    mask->s_addr = prefix ? htonl(0xffffffffu << (32 - prefix)) : 0;
    return inet_aton(plain, address) != 0;
}

/* NULL when it worked, else what did not. */
const char *net_configure(const char *address, const char *gateway) {
    struct in_addr own, mask, via;
    const char *problem = NULL;
    if (!parse_address(address, &own, &mask) || (gateway && !inet_aton(gateway, &via)))
        return "an address is like 10.0.0.2/24, a gateway like 10.0.0.1";
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    link_up(control, "lo");
    if (!set_address(control, SIOCSIFADDR, own) || !set_address(control, SIOCSIFNETMASK, mask))
        problem = "there is no eth0";
    else if (!link_up(control, "eth0"))
        problem = "eth0 does not come up";
    else if (gateway && !set_gateway(control, via))
        problem = "the gateway is not reachable";
    close(control);
    return problem;
}

static int listening(int type, uint16_t port) {
    int on = 1, fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof any) < 0)
        say("HOSTLER-GUEST no port %d: %s", port, strerror(errno));
    return fd;
}

static void *echo_datagrams(void *argument) {
    int fd = listening(SOCK_DGRAM, UDP_PORT);
    (void)argument;
    for (;;) {
        struct frame frame;
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        if (recvfrom(fd, &frame, sizeof frame, 0, (struct sockaddr *)&from, &size) < REQUEST_BYTES)
            continue;
        stamp(&frame);
        sendto(fd, &frame, sizeof frame, 0, (struct sockaddr *)&from, size);
    }
    return NULL;
}

static void *echo_stream(void *argument) {
    int fd = (int)(intptr_t)argument, on = 1;
    struct frame frame;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    while (recv(fd, &frame, REQUEST_BYTES, MSG_WAITALL) == REQUEST_BYTES) {
        stamp(&frame);
        if (send(fd, &frame, sizeof frame, MSG_NOSIGNAL) != (ssize_t)sizeof frame)
            break;
    }
    close(fd);
    return NULL;
}

static void *accept_streams(void *argument) {
    int fd = listening(SOCK_STREAM, TCP_PORT);
    (void)argument;
    listen(fd, 16);
    for (;;) {
        int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (connection >= 0)
            start_thread(echo_stream, (void *)(intptr_t)connection);
        else
            sleep_until_ns(now_ns() + 10000000);
    }
    return NULL;
}

static void count_answers(int fd) {
    struct frame frame;
    while (recv(fd, &frame, sizeof frame, MSG_DONTWAIT) > 0)
        atomic_fetch_add(&beats_answered, 1);
}

static void *beat_on(void *argument) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    uint64_t next = now_ns(), interval;
    (void)argument;
    while ((interval = atomic_load(&beat_interval_ns)) > 0) {
        struct frame frame = {.sequence = htobe64(atomic_fetch_add(&beats_sent, 1)), .time = htobe64(now_ns())};
        stamp(&frame);
        sendto(fd, &frame, sizeof frame, MSG_DONTWAIT, (struct sockaddr *)&beat_to, sizeof beat_to);
        count_answers(fd);
        next += interval;
        if (next < now_ns())
            next = now_ns() + interval;
        sleep_until_ns(next);
    }
    close(fd);
    atomic_store(&beating, false);
    return NULL;
}

void net_beat(const char *address, uint64_t port, uint64_t interval_ms) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_aton(address, &to.sin_addr);
    beat_to = to;
    atomic_store(&beat_interval_ns, interval_ms * 1000000ull);
    if (interval_ms && !atomic_exchange(&beating, true))
        start_thread(beat_on, NULL);
}

void net_serve(void) {
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    link_up(control, "lo");
    close(control);
    start_thread(echo_datagrams, NULL);
    start_thread(accept_streams, NULL);
}

void cmd_ip(const struct request *request) {
    const char *problem = net_configure(request->argv[1], request->argc > 2 ? request->argv[2] : NULL);
    if (problem)
        refuse(request, "%s", problem);
    else
        answer(request, "{}");
}

void cmd_mac(const struct request *request) {
    char address[32];
    if (read_text("/sys/class/net/eth0/address", address, sizeof address))
        answer(request, "{\"mac\":\"%s\"}", address);
    else
        refuse(request, "there is no eth0");
}

/* beat ADDRESS PORT INTERVAL_MS: numbered datagrams to an observer, for guests that nobody can reach; 0 ends them. */
void cmd_beat(const struct request *request) {
    struct in_addr address;
    uint64_t port, interval;
    if (!inet_aton(request->argv[1], &address) || !parse_u64(request->argv[2], &port) || port > 65535 ||
        !parse_u64(request->argv[3], &interval) || interval > 60000) {
        refuse(request, "beat ADDRESS PORT INTERVAL_MS");
        return;
    }
    net_beat(request->argv[1], port, interval);
    answer(request, "{\"sent\":%llu,\"answered\":%llu}", (unsigned long long)atomic_load(&beats_sent),
           (unsigned long long)atomic_load(&beats_answered));
}
