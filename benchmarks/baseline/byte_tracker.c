/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The other obvious way, which other VMMs take: one byte per page, not 0 means shared.
 *
 * A request is gone through page by page and nothing outside of it is looked at, so the size of the guest does not
 * matter; that of the request does. Every page that becomes shared is a map call of its own; neighbouring pages that
 * become private are joined into one unmap call.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "tracker.h"

struct tracker {
	uint8_t *shared;
	uint64_t pages;
	struct listener *listener;
};

struct tracker *tracker_new(uint64_t pages, struct listener *listener)
{
	struct tracker *tracker = malloc(sizeof(*tracker));

	if (tracker == NULL)
		abort();
	tracker->shared = zeroed(pages);
	tracker->pages = pages;
	tracker->listener = listener;
	return tracker;
}

static void share(struct tracker *tracker, uint64_t start, uint64_t end)
{
	struct listener *listener = tracker->listener;

	for (uint64_t page = start; page < end; page++) {
		if (tracker->shared[page])
			continue;
		listener->map(listener, page);
		tracker->shared[page] = 1;
	}
}

static void unshare(struct tracker *tracker, uint64_t start, uint64_t end)
{
	struct listener *listener = tracker->listener;
	uint64_t run = start;

	for (uint64_t page = start; page < end; page++) {
		if (tracker->shared[page]) {
			tracker->shared[page] = 0;
			continue;
		}
		if (run < page)
			listener->unmap(listener, run, page);
		run = page + 1;
	}
	if (run < end)
		listener->unmap(listener, run, end);
}

void tracker_change(struct tracker *tracker, uint64_t start, uint64_t end, bool to_shared)
{
	if (to_shared)
		share(tracker, start, end);
	else
		unshare(tracker, start, end);
}

bool tracker_next_run(const struct tracker *tracker, uint64_t from, uint64_t limit, uint64_t *start,
		      uint64_t *end)
{
	const uint8_t *found = from < limit ? memchr(tracker->shared + from, 1, limit - from) : NULL;

	*start = *end = limit;
	if (found == NULL)
		return false;
	*start = (uint64_t)(found - tracker->shared);
	found = memchr(found, 0, limit - *start);
	if (found != NULL)
		*end = (uint64_t)(found - tracker->shared);
	return true;
}
