/* Work in parts that do not touch each other, so that threads share it; see compiled.py.

   Every function that Python calls is a `Work`: what it is given, in order, and which parts it does. */

#ifndef ALPHAQUANT_PARTS
#define ALPHAQUANT_PARTS

#include <stdint.h>

typedef union {
    void *pointer;
    int64_t integer;
    float real;
} Given;

#define POINTER ((given++)->pointer)
#define INTEGER ((given++)->integer)
#define REAL ((given++)->real)

typedef void Work(const Given *given, int64_t first, int64_t last);

/* OpenMP's, of the library that torch has loaded. */
typedef struct {
    void (*parallel)(void (*share)(void *), void *shared, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*number)(void), (*count)(void); /* omp_get_thread_num, omp_get_num_threads */
} OpenMP;

typedef struct {
    Work *work;
    const Given *given;
    int64_t total;
    const OpenMP *omp;
} Shared;

static void do_share(void *shared) {
    const Shared *all = shared;
    int64_t number = all->omp->number(), count = all->omp->count();
    all->work(all->given, all->total * number / count, all->total * (number + 1) / count);
}

/* All parts, by threads that are torch's own: others beside them would take turns with these, which wait awake. */
void share_work(Work *work, const Given *given, int64_t total, int64_t threads, const OpenMP *omp) {
    Shared all = {work, given, total, omp};
    omp->parallel(do_share, &all, (unsigned)threads, 0);
}

#endif
