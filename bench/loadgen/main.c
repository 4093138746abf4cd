/* Commands on stdin, one line of JSON on stdout for each that answers:
 *
 *   open PORT SOURCE COUNT PARALLEL SECONDS FILE
 *                                              connect more clients, from the address SOURCE -> clients, failed, seconds
 *   pace FRAMES RECORDS SIZE RATE FROM:TO ...  declare paced flows: FRAMES in each of RECORDS writes per burst, RATE packets/s
 *   ping SIZE FROM:TO ...                      declare ping-pong flows
 *   run WARM_UP SECONDS QUIET                  run what was declared, then wait for packets under way until none came for
 *                                              QUIET seconds              -> counts and times (microseconds)
 *
 * The end of stdin ends the program. An error is one sentence on stderr and exit status 1.
 */
#include "loadgen.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void command_open(const char *arguments) {
    int port;
    uint32_t count, parallel;
    double limit;
    char file[4096], source[64];
    if (sscanf(arguments, "%d %63s %u %u %lf %4095s", &port, source, &count, &parallel, &limit, file) != 6 || parallel == 0)
        die("usage: open PORT SOURCE COUNT PARALLEL SECONDS FILE");
    uint64_t start = now_ns();
    uint32_t ready = clients_open(port, source, count, parallel, limit, file);
    printf("{\"clients\": %u, \"failed\": %u, \"seconds\": %.6f}\n", ready, count - ready, (double)(now_ns() - start) / 1e9);
}

static void command_pace(char *arguments) {
    uint32_t frames, records, size;
    double rate;
    int used;
    if (sscanf(arguments, "%u %u %u %lf %n", &frames, &records, &size, &rate, &used) != 4)
        die("usage: pace FRAMES RECORDS SIZE RATE FROM:TO ...");
    load_pace(frames, records, size, rate, arguments + used);
}

static void command_ping(char *arguments) {
    uint32_t size;
    int used;
    if (sscanf(arguments, "%u %n", &size, &used) != 1)
        die("usage: ping SIZE FROM:TO ...");
    load_ping(size, arguments + used);
}

static void command_run(const char *arguments) {
    double warm_up, seconds, quiet;
    if (sscanf(arguments, "%lf %lf %lf", &warm_up, &seconds, &quiet) != 3 || seconds <= 0)
        die("usage: run WARM_UP SECONDS QUIET");
    load_run(warm_up, seconds, quiet, stdout);
}

int main(void) {
    char *line = NULL;
    size_t room = 0;
    clients_init(load_packet);
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (getline(&line, &room, stdin) > 0) {
        if (strncmp(line, "open ", 5) == 0)
            command_open(line + 5);
        else if (strncmp(line, "pace ", 5) == 0)
            command_pace(line + 5);
        else if (strncmp(line, "ping ", 5) == 0)
            command_ping(line + 5);
        else if (strncmp(line, "run ", 4) == 0)
            command_run(line + 4);
        else
            die("unknown command: %s", line);
    }
    free(line);
    return 0;
}
