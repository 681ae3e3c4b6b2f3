// SPDX-License-Identifier: Apache-2.0
/*
 * Lines about VMs, launches, attributes and faults, with the time of QEMU's clock, in seconds.
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "shim.h"

static FILE *file;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void log_open(const char *path)
{
    file = path ? fopen(path, "ae") : NULL;
    if (file)
        setvbuf(file, NULL, _IOLBF, 0);
}

void log_call(const char *format, ...)
{
    struct timespec now;
    va_list list;
    int error = errno; /* the caller's answer may still be an error of the kernel's */

    if (!file)
        return;
    clock_gettime(CLOCK_REALTIME, &now);
    pthread_mutex_lock(&lock);
    fprintf(file, "%ld.%06ld ", now.tv_sec, now.tv_nsec / 1000);
    va_start(list, format);
    vfprintf(file, format, list);
    va_end(list);
    fputc('\n', file);
    pthread_mutex_unlock(&lock);
    errno = error;
}
