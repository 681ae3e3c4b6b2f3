/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a baseline is to the driver: something that tracks which pages of a guest are shared, and calls out when that
 * changes. bitmap_tracker.c and byte_tracker.c each implement it; driver.c replays recorded requests into it.
 *
 * Pages are numbers, ranges are half-open.
 */
#ifndef TRACKER_H
#define TRACKER_H

#include <stdbool.h>
#include <stdint.h>

/* The two verbs of a listener, through pointers, as any VMM has them. */
struct listener {
	void (*map)(struct listener *self, uint64_t page);
	void (*unmap)(struct listener *self, uint64_t start, uint64_t end);
	uint64_t maps;
	uint64_t unmaps;
};

struct tracker;

/* A tracker of *pages* pages, all private. Exits when there is no memory. */
struct tracker *tracker_new(uint64_t pages, struct listener *listener);

/* The state of [start, end) becomes shared or private; the listener hears of what differs. */
void tracker_change(struct tracker *tracker, uint64_t start, uint64_t end, bool to_shared);

/* The first shared run that touches [from, limit), clipped to it; false when there is none. */
bool tracker_next_run(const struct tracker *tracker, uint64_t from, uint64_t limit, uint64_t *start,
		      uint64_t *end);

/* All state: never touched pages stay untouched, as after calloc(). Shared by both trackers. */
void *zeroed(uint64_t size);

#endif
