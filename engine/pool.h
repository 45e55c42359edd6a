/* A pool of threads that stay: one job runs on all of them, phases of the job meet at a barrier.
 *
 * A decode step of a small model lasts 60 us and has 30 barriers, so waiting spins first; a waiter that sees nothing
 * for long yields its core (somebody else may need it), and between jobs it goes to sleep on a condition variable.
 * Neighbours: cpu.c, which runs every step of the model as one job. */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define MAX_THREADS 1024 /* core/config.py: MOST_THREADS */
#define SPINS_BEFORE_PAUSE 200    /* plain loads: a barrier that is nearly done is seen at once */
#define SPINS_BEFORE_YIELD 2000   /* pauses: about 50 us */
#define SECONDS_BEFORE_SLEEP 3e-3 /* between jobs: longer than sampling a token takes */

typedef void (*job_fn)(void *arg, int tid);

/* What a thread tells the others, the two on a cache line each, side by side: the fewer pages are touched between two
 * products, the sooner the prefetchers of the hardware follow the weights again (docs/LOG.md). */
typedef struct {
    _Alignas(64) atomic_uint epoch;     /* how many barriers this thread has reached */
    _Alignas(64) atomic_int taken[2];   /* for `share`, in turns */
    unsigned begun;
} seat;

typedef struct {
    _Alignas(64) atomic_uint job;    /* rises by one with each job; the workers wait for that */
    _Alignas(64) int n;              /* threads, the caller's own included */
    job_fn fn;
    void *arg;
    atomic_int sleepers;
    atomic_int quit;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    seat seat[MAX_THREADS];
    pthread_t thread[MAX_THREADS];
    struct worker { void *pool; int tid; } worker[MAX_THREADS];
} pool;

/* Where the part of thread `tid` of `threads` begins in n units of work; tid + 1: where it ends. */
static inline int part_of(int n, int tid, int threads) { return (int)((int64_t)n * tid / threads); }

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* All threads of the pool wait here for each other. */
static inline void barrier(pool *p, int tid) {
    if (p->n == 1) return;
    unsigned epoch = atomic_load_explicit(&p->seat[tid].epoch, memory_order_relaxed) + 1;
    atomic_store_explicit(&p->seat[tid].epoch, epoch, memory_order_release);
    for (int i = 0; i < p->n; i++) {
        int spins = 0;
        while ((int)(atomic_load_explicit(&p->seat[i].epoch, memory_order_acquire) - epoch) < 0) {
            if (++spins > SPINS_BEFORE_PAUSE) relax();
            if (spins > SPINS_BEFORE_YIELD) sched_yield();
        }
    }
}

/* Units of work 0..n-1 for one thread: it takes those of its own part in order; where parts are shared, it then goes on
 * with what is left of the others', so that a slow core holds nobody up. The unit taken last lies in [from, end). */
typedef struct {
    pool *threads;
    int n, parity, visits, whose, from, end, at;
    bool shared;
} share;

static inline void visit(share *s, int whose) {
    s->whose = whose;
    s->from = part_of(s->n, whose, s->threads->n);
    s->end = part_of(s->n, whose + 1, s->threads->n);
}

/* All threads begin the same work, with a barrier before the next. */
static inline share begin(pool *p, int tid, int n, bool shared) {
    seat *mine = &p->seat[tid];
    share s = {.threads = p, .n = n, .parity = mine->begun++ % 2, .visits = 1, .shared = shared && p->n > 1};
    atomic_store_explicit(&mine->taken[!s.parity], 0, memory_order_relaxed); /* nobody looks at it before the barrier */
    visit(&s, tid);
    s.at = s.from;
    return s;
}

/* Takes up to `most` units that follow each other, fewer as a part comes to its end; returns how
 * many, 0 after the last. */
static inline int take(share *s, int most, int *unit) {
    if (!s->shared) {
        int n = (s->end - s->at + 1) / 2 < most ? (s->end - s->at + 1) / 2 : most;
        *unit = s->at;
        s->at += n;
        return n;
    }
    for (;;) {
        atomic_int *taken = &s->threads->seat[s->whose].taken[s->parity];
        int done = atomic_load_explicit(taken, memory_order_relaxed), left;
        while ((left = s->end - s->from - done) > 0) {
            int n = (left + 1) / 2 < most ? (left + 1) / 2 : most;
            *unit = s->from + done;
            if (atomic_compare_exchange_weak_explicit(taken, &done, done + n, memory_order_relaxed,
                                                      memory_order_relaxed))
                return n;
        }
        if (s->visits++ == s->threads->n) return 0;
        visit(s, (s->whose + 1) % s->threads->n);
    }
}

static void *worker_main(void *arg) {
    struct worker *me = arg;
    pool *p = me->pool;
    unsigned seen = 0;
    for (;;) {
        int spins = 0;
        double since = 0;
        while (atomic_load_explicit(&p->job, memory_order_acquire) == seen) {
            relax();
            if (++spins < SPINS_BEFORE_YIELD || spins % 64) continue;
            sched_yield();
            double now = seconds();
            if (since == 0) since = now;
            if (now - since < SECONDS_BEFORE_SLEEP) continue;
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1);
            while (atomic_load(&p->job) == seen) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        seen++;
        if (atomic_load(&p->quit)) return NULL;
        p->fn(p->arg, me->tid);
        barrier(p, me->tid);
    }
}

/* Runs fn(arg, tid) on every thread, this one as tid 0, and returns when all are done. */
static void pool_run(pool *p, job_fn fn, void *arg) {
    p->fn = fn;
    p->arg = arg;
    /* sequentially consistent with `sleepers`: a worker sees the job or is seen asleep */
    atomic_fetch_add(&p->job, 1);
    if (p->n > 1 && atomic_load(&p->sleepers)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    fn(arg, 0);
    barrier(p, 0);
}

/* Starts up to n - 1 workers; p->n says how many threads there are. */
static void pool_start(pool *p, int n) {
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->n = n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
    for (int i = 1; i < p->n; i++) {
        p->worker[i] = (struct worker){p, i};
        if (pthread_create(&p->thread[i], NULL, worker_main, &p->worker[i])) {
            p->n = i;  /* before the first job, so nobody has waited at a barrier yet */
            break;
        }
    }
}

static void pool_stop(pool *p) {
    atomic_store(&p->quit, 1);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->job, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->n; i++) pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
}
