/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The published algorithm, written from its description: one bit per page, set means shared.
 *
 * A request is classified by two searches, one for the next set and one for the next clear bit. Both run from the start
 * of the request to the END OF THE BITMAP: whether what they find lies behind the request is looked at afterwards. A
 * uniform range is one bitmap operation and one notification; a mixture is gone through page by page. Every page that
 * becomes shared is a map call of its own, because a mapping cannot be cut later; a notified run is one unmap call.
 */
#include <stddef.h>
#include <stdlib.h>

#include "tracker.h"

#define WORD_BITS 64

struct tracker {
	uint64_t *words;
	uint64_t pages;
	struct listener *listener;
};

struct tracker *tracker_new(uint64_t pages, struct listener *listener)
{
	struct tracker *tracker = malloc(sizeof(*tracker));

	if (tracker == NULL)
		abort();
	tracker->words = zeroed((pages + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t));
	tracker->pages = pages;
	tracker->listener = listener;
	return tracker;
}

/*
 * The first bit of [from, limit) that equals *value*; *limit* when there is none.
 *
 * Four words at a time where nothing is found: the searches of real VMMs are unrolled too, and the baseline is to be as
 * good as the algorithm can be.
 */
static uint64_t next_bit(const struct tracker *tracker, uint64_t from, uint64_t limit, bool value)
{
	const uint64_t flip = value ? 0 : ~UINT64_C(0);
	const uint64_t *words = tracker->words;
	uint64_t index, last, word, bit;

	if (from >= limit)
		return limit;
	index = from / WORD_BITS;
	last = (limit - 1) / WORD_BITS;
	word = (words[index] ^ flip) & (~UINT64_C(0) << (from % WORD_BITS));
	while (word == 0) {
		index++;
		while (index + 4 <= last && ((words[index] ^ flip) | (words[index + 1] ^ flip) |
					     (words[index + 2] ^ flip) | (words[index + 3] ^ flip)) == 0)
			index += 4;
		if (index > last)
			return limit;
		word = words[index] ^ flip;
	}
	bit = index * WORD_BITS + (uint64_t)__builtin_ctzll(word);
	return bit < limit ? bit : limit;
}

static bool test_page(const struct tracker *tracker, uint64_t page)
{
	return tracker->words[page / WORD_BITS] >> (page % WORD_BITS) & 1;
}

static void fill(struct tracker *tracker, uint64_t start, uint64_t end, bool value)
{
	uint64_t first = start / WORD_BITS, last = (end - 1) / WORD_BITS;
	uint64_t head = ~UINT64_C(0) << (start % WORD_BITS);
	uint64_t tail = ~UINT64_C(0) >> (WORD_BITS - 1 - (end - 1) % WORD_BITS);

	for (uint64_t index = first; index <= last; index++) {
		uint64_t mask = ~UINT64_C(0);

		if (index == first)
			mask &= head;
		if (index == last)
			mask &= tail;
		if (value)
			tracker->words[index] |= mask;
		else
			tracker->words[index] &= ~mask;
	}
}

static void notify(struct tracker *tracker, uint64_t start, uint64_t end, bool to_shared)
{
	struct listener *listener = tracker->listener;

	if (!to_shared) {
		listener->unmap(listener, start, end);
		return;
	}
	for (uint64_t page = start; page < end; page++)
		listener->map(listener, page);
}

void tracker_change(struct tracker *tracker, uint64_t start, uint64_t end, bool to_shared)
{
	bool all_private = next_bit(tracker, start, tracker->pages, true) >= end;
	bool all_shared = next_bit(tracker, start, tracker->pages, false) >= end;

	if (to_shared ? all_shared : all_private)
		return;
	if (to_shared ? all_private : all_shared) {
		fill(tracker, start, end, to_shared);
		notify(tracker, start, end, to_shared);
		return;
	}
	for (uint64_t page = start; page < end; page++) {
		if (test_page(tracker, page) == to_shared)
			continue;
		fill(tracker, page, page + 1, to_shared);
		notify(tracker, page, page + 1, to_shared);
	}
}

bool tracker_next_run(const struct tracker *tracker, uint64_t from, uint64_t limit, uint64_t *start,
		      uint64_t *end)
{
	*start = next_bit(tracker, from, limit, true);
	*end = next_bit(tracker, *start, limit, false);
	return *start < limit;
}
