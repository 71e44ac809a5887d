/* SPDX-License-Identifier: Apache-2.0
 *
 * The control protocol of the fake: one line of text in, one text out. It sets failure modes while
 * programs run, and `status` shows the model as JSON.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fake.h"

struct text { char *at; size_t left; };

static void put(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(struct text *t, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(t->at, t->left, format, args);
    va_end(args);
    size_t used = n < 0 ? 0 : (size_t)n < t->left ? (size_t)n : t->left - 1;
    t->at += used;
    t->left -= used;
}

static _Atomic bool slow;

bool knobs_slow(void)
{
    return slow;
}

static void rules_changed(void)
{
    bool any = false;
    for (int i = 0; i < RULES; i++)
        any |= machine.rules[i].left && machine.rules[i].delay_us;
    slow = any;
}

uint32_t knobs_rule(bool alloc, uint32_t number)
{
    uint32_t status = NV_OK;
    for (int i = 0; i < RULES; i++) {
        struct rule *r = &machine.rules[i];
        if (!r->left || r->alloc != alloc || r->number != number)
            continue;
        if (r->left != UINT32_MAX)
            r->left--;
        if (r->delay_us)
            usleep(r->delay_us); /* rm_lock is held: this is the slow call that holds up the others */
        else
            status = r->status;
    }
    rules_changed();
    return status;
}

static void status(struct text *t)
{
    static const char *const runs[] = {"evict", "on", "drain"};
    static const char *const states[] = {"idle", "running", "parked", "dead"};
    const char *sep = "";
    sched_collect_faults();
    put(t, "{\"branch\": \"%s\", \"version\": \"%s\", \"gpus\": %u, \"calls\": %llu, "
           "\"remaps_while_running\": %llu, \"evict_timeouts\": %llu, \"used_bytes\": [",
        machine.branch->name, machine.version, machine.gpus, (unsigned long long)machine.calls,
        (unsigned long long)machine.remaps_while_running, (unsigned long long)machine.evict_timeouts);
    for (unsigned i = 0; i < machine.gpus; i++)
        put(t, "%s%llu", i ? ", " : "", (unsigned long long)machine.used_bytes[i]);
    put(t, "], \"xids\": [");
    for (unsigned i = 0; i < machine.gpus; i++)
        put(t, "%s[%u, %llu]", i ? ", " : "", machine.last_xid[i], (unsigned long long)machine.xid_count[i]);
    put(t, "], \"files\": [");
    pthread_mutex_lock(&files_lock);
    for (struct file *f = machine.files; f; f = f->next, sep = ", ")
        put(t, "%s{\"kind\": \"%s\", \"pid\": %d, \"inode\": %llu}", sep,
            f->kind == FILE_CTL ? "ctl" : f->kind == FILE_UVM ? "uvm" : "gpu", f->pid, (unsigned long long)f->inode);
    pthread_mutex_unlock(&files_lock);
    put(t, "], \"clients\": [");
    sep = "";
    for (struct client *c = machine.clients; c; c = c->next, sep = ", ") {
        unsigned objects = 0;
        for (struct object *o = c->objects; o; o = o->next)
            objects++;
        put(t, "%s{\"handle\": %u, \"pid\": %d, \"objects\": %u}", sep, c->handle, c->pid, objects);
    }
    put(t, "], \"channels\": [");
    sep = "";
    for (struct channel *c = machine.channels; c; c = c->next_all, sep = ", ") {
        struct fakenv_slot *s = c->engine ? &c->engine->shared->slot[c->token] : NULL;
        put(t, "%s{\"client\": %u, \"handle\": %u, \"gpu\": %u, \"engine\": %u, \"tsg\": %d, \"token\": %u, "
               "\"disabled\": %s, \"run\": \"%s\", \"state\": \"%s\", \"ctas\": %llu, \"evictions\": %u}",
            sep, c->client, c->handle, c->gpu, c->engine_type, c->tsg ? (int)c->tsg->id : -1, c->token,
            c->disabled ? "true" : "false", s ? runs[s->run % 3] : "none", s ? states[s->state % 4] : "none",
            s ? (unsigned long long)s->ctas : 0ull, s ? s->evictions : 0);
    }
    put(t, "]}");
}

static bool add_rule(const char *what, const char *number, uint32_t denied_with, uint32_t delay_us, const char *times)
{
    bool alloc = strcmp(what, "alloc") == 0;
    if (!alloc && strcmp(what, "control") != 0)
        return false;
    for (int i = 0; i < RULES; i++)
        if (!machine.rules[i].left) {
            machine.rules[i] = (struct rule){
                .number = (uint32_t)strtoul(number, NULL, 0), .alloc = alloc, .status = denied_with,
                .delay_us = delay_us, .left = times ? (uint32_t)strtoul(times, NULL, 0) : UINT32_MAX};
            rules_changed();
            return true;
        }
    return false;
}

static _Atomic unsigned holds;

static void *hold(void *milliseconds)
{
    pthread_mutex_lock(&rm_lock);
    holds++;
    usleep((useconds_t)(intptr_t)milliseconds * 1000);
    pthread_mutex_unlock(&rm_lock);
    return NULL;
}

static int index_of(const char *word, const char *const *words)
{
    for (int i = 0; words[i]; i++)
        if (word && strcmp(word, words[i]) == 0)
            return i;
    return -1;
}

/* Executes the words; false: not understood. */
static bool execute(char **word, unsigned words)
{
    static const char *const evicts[] = {"disable", "commit", "siblings", NULL};
    static const char *const validates[] = {"strict", "patched", NULL};
    unsigned gpu = words > 1 ? (unsigned)strtoul(word[1], NULL, 0) : 0;
    unsigned long value = words > 2 ? strtoul(word[2], NULL, 0) : 0;
    int choice;
    if (!words)
        return false;
    if (strcmp(word[0], "deny") == 0 && words >= 4)
        return add_rule(word[1], word[2], (uint32_t)strtoul(word[3], NULL, 0), 0, words > 4 ? word[4] : NULL);
    if (strcmp(word[0], "delay") == 0 && words >= 4)
        return add_rule(word[1], word[2], 0, (uint32_t)strtoul(word[3], NULL, 0), words > 4 ? word[4] : NULL);
    if (strcmp(word[0], "clear") == 0) {
        memset(machine.rules, 0, sizeof machine.rules);
        rules_changed();
        return true;
    }
    if (strcmp(word[0], "evict") == 0 && words == 2 && (choice = index_of(word[1], evicts)) >= 0) {
        machine.evict = (enum evict)choice;
        return true;
    }
    if (strcmp(word[0], "validate") == 0 && words == 2 && (choice = index_of(word[1], validates)) >= 0) {
        machine.validate = (enum validate)choice;
        return true;
    }
    if (strcmp(word[0], "unmap-syncs") == 0 && words == 2) {
        machine.unmap_syncs = gpu;
        pthread_mutex_lock(&files_lock);
        for (struct file *f = machine.files; f; f = f->next)
            if (f->engine)
                atomic_store(&f->engine->shared->unmap_syncs, gpu);
        pthread_mutex_unlock(&files_lock);
        return true;
    }
    if (gpu >= machine.gpus)
        return false;
    if (strcmp(word[0], "xid") == 0 && words == 3) {
        machine.last_xid[gpu] = (uint32_t)value;
        machine.xid_count[gpu]++;
        return true;
    }
    if (strcmp(word[0], "lost") == 0 && words == 3) {
        machine.lost[gpu] = value;
        if (value) {
            machine.last_xid[gpu] = 79;
            machine.xid_count[gpu]++;
        }
        sched_apply_gpu(gpu);
        return true;
    }
    return false;
}

void knobs_execute(const char *line, char *reply, size_t bytes)
{
    struct text t = {reply, bytes};
    char copy[256], *word[6], *save = NULL;
    unsigned words = 0;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *w = strtok_r(copy, " \n", &save); w && words < 6; w = strtok_r(NULL, " \n", &save))
        word[words++] = w;
    if (words == 2 && strcmp(word[0], "hold") == 0) {
        pthread_t thread;
        unsigned before = holds;
        if (pthread_create(&thread, NULL, hold, (void *)(intptr_t)strtol(word[1], NULL, 0))) {
            put(&t, "error: no thread is to be had");
            return;
        }
        pthread_detach(thread);
        while (holds == before) /* the answer says that the lock is held */
            usleep(100);
        put(&t, "ok");
        return;
    }
    pthread_mutex_lock(&rm_lock);
    if (words == 1 && strcmp(word[0], "status") == 0)
        status(&t);
    else
        put(&t, "%s", execute(word, words) ? "ok" : "error: not understood; see tests/fakenv/README.md");
    pthread_mutex_unlock(&rm_lock);
}
