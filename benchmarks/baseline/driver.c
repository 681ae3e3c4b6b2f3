/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Replays a recorded list of requests into a tracker, times the ones that are marked, and tells how it ended.
 *
 *     bitmap_tracker REQUESTS noop|syscall REPLAYS
 *
 * REQUESTS is written by ../harness/requests.py, all numbers little-endian 64 bit:
 *     pages, number of requests, number of windows
 *     requests: start, end, flags (bit 0: to shared, bit 1: timed)
 *     windows:  start, end
 *
 * Times are CPU times of this thread. Timed requests of one direction that follow each other are a
 * group with one reading of the clock before and one after it: the clock is a system call and costs
 * more than a small request.
 *
 * Afterwards everything that is shared is told to a new listener REPLAYS times, as when a device is plugged. On stdout,
 * one fact per line:
 *     clock NS               what reading the clock costs (best decile, as all that is reported)
 *     calls MAPS UNMAPS      for the requests
 *     run START END          what is shared inside the windows at the end
 *     time NS COUNT          one per timed group, in order, and how many requests it had
 *     replay NS              one per replay
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "tracker.h"

#define TO_SHARED 1
#define TIMED 2
#define CLOCK_SAMPLES 1001

struct header {
	uint64_t pages, requests, windows;
};

struct request {
	uint64_t start, end, flags;
};

struct time {
	uint64_t elapsed, count;
};

struct window {
	uint64_t start, end;
};

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

void *zeroed(uint64_t size)
{
	/* What calloc() does for such sizes, without asking the kernel to promise memory for a guest of 16 TiB. */
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	return memory;
}

/* -- listeners: both count, one also goes to the kernel and back ------------------------------------------------- */

static void count_map(struct listener *self, uint64_t page)
{
	(void)page;
	self->maps++;
}

static void count_unmap(struct listener *self, uint64_t start, uint64_t end)
{
	(void)start;
	(void)end;
	self->unmaps++;
}

static void syscall_map(struct listener *self, uint64_t page)
{
	(void)page;
	self->maps++;
	syscall(SYS_getppid);
}

static void syscall_unmap(struct listener *self, uint64_t start, uint64_t end)
{
	(void)start;
	(void)end;
	self->unmaps++;
	syscall(SYS_getppid);
}

/* -- time -------------------------------------------------------------------------------------------------------- */

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static uint64_t clock_cost(void)
{
	uint64_t samples[CLOCK_SAMPLES];

	for (size_t index = 0; index < CLOCK_SAMPLES; index++) {
		uint64_t before = now();

		samples[index] = now() - before;
	}
	qsort(samples, CLOCK_SAMPLES, sizeof(samples[0]), by_value);
	return samples[CLOCK_SAMPLES / 10];
}

/* -- the program ------------------------------------------------------------------------------------------------- */

static const struct header *load(const char *path)
{
	int fd = open(path, O_RDONLY);
	struct stat status;
	const struct header *header;

	if (fd < 0 || fstat(fd, &status) < 0)
		die(path);
	header = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	if (header == MAP_FAILED)
		die(path);
	close(fd);
	return header;
}

static void replay(const struct tracker *tracker, uint64_t pages, struct listener *listener)
{
	uint64_t position = 0, start, end;

	while (tracker_next_run(tracker, position, pages, &start, &end)) {
		for (uint64_t page = start; page < end; page++)
			listener->map(listener, page);
		position = end;
	}
}

/* Makes the requests at the beginning that are one group; returns how many they were. */
static uint64_t change_group(struct tracker *tracker, const struct request *requests, uint64_t count)
{
	uint64_t index = 0, flags = requests[0].flags;

	do {
		tracker_change(tracker, requests[index].start, requests[index].end, flags & TO_SHARED);
		index++;
	} while (index < count && requests[index].flags == flags);
	return index;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: %s REQUESTS noop|syscall REPLAYS\n", argv[0]);
		return 2;
	}
	const struct header *header = load(argv[1]);
	const struct request *requests = (const struct request *)(header + 1);
	const struct window *windows = (const struct window *)(requests + header->requests);
	bool system_call = strcmp(argv[2], "syscall") == 0;
	uint64_t replays = strtoull(argv[3], NULL, 10), timed = 0;
	struct listener listener = {
		.map = system_call ? syscall_map : count_map,
		.unmap = system_call ? syscall_unmap : count_unmap,
	};
	struct tracker *tracker = tracker_new(header->pages, &listener);
	struct time *times = calloc(header->requests + 1, sizeof(*times));

	if (times == NULL)
		die("calloc");
	for (uint64_t index = 0; index < header->requests;) {
		bool is_timed = requests[index].flags & TIMED;
		uint64_t before = now();
		uint64_t count = change_group(tracker, requests + index, header->requests - index);

		if (is_timed)
			times[timed++] = (struct time){now() - before, count};
		index += count;
	}
	printf("clock %" PRIu64 "\n", clock_cost());
	printf("calls %" PRIu64 " %" PRIu64 "\n", listener.maps, listener.unmaps);
	for (uint64_t index = 0; index < timed; index++)
		printf("time %" PRIu64 " %" PRIu64 "\n", times[index].elapsed, times[index].count);
	for (uint64_t index = 0; index < replays; index++) {
		uint64_t before = now();

		replay(tracker, header->pages, &listener);
		printf("replay %" PRIu64 "\n", now() - before);
	}
	for (uint64_t index = 0; index < header->windows; index++) {
		uint64_t position = windows[index].start, start, end;

		while (tracker_next_run(tracker, position, windows[index].end, &start, &end)) {
			printf("run %" PRIu64 " %" PRIu64 "\n", start, end);
			position = end;
		}
	}
	return 0;
}
