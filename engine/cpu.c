/* The whole decode step of a model in one call: packed weights in, logits out.
 *
 * A step is one job on all threads of the pool (pool.h). Its phases, with a barrier between any two:
 *
 *   norm, quantize | q, k, v | rope, attention | sub-norm, quantize | o
 *   norm, quantize | gate, up | sub-norm, quantize | down
 *
 * A single token is normed and quantized by every thread for itself, which is cheaper than a barrier. Every number is
 * computed by one thread in an order that depends neither on how many threads there are nor on how the tokens were cut
 * into chunks, so prefill, cached decoding and any thread count give bitwise the same logits.
 *
 * Compiled as one unit (kernels/build.py), called through cpu.py. Neighbours: model.h (structs and layouts),
 * activation.h, product.h, attention.h, pool.h (threads), probes.h (tests); kernels/ has integers.h and floats.h. */
#include "attention.h"
#include "probes.h"

/* ---------------------------------------------------------------- the step -------------------------------------- */
/* fp32 row of the embedding */
static void embed(const matrix *w, int64_t token, float *to) {
    int r = (int)(token % ROWS);
    const uint8_t *p = w->w + (size_t)(token / ROWS) * (size_t)w->groups * (size_t)BYTES[w->kind];
    float scale = w->kind == BF16 ? 1.0f : w->scale[token];
    for (int k = 0; k < w->k; k++) {
        const uint8_t *line = p + (size_t)(k / COLS[w->kind]) * (size_t)BYTES[w->kind];
        int c = k % COLS[w->kind];
        if (w->kind == BF16) {
            uint32_t bits = (uint32_t)line[4 * r + 2 * c] << 16 | (uint32_t)line[4 * r + 2 * c + 1] << 24;
            memcpy(to + k, &bits, 4);
        } else if (w->kind == Q8) {
            to[k] = (float)(line[4 * r + c] - 128) * scale;
        } else {
            int b = 4 * r + c % 4, p4 = c / 4; /* plane p4 of the group */
            int low = line[64 * (p4 / 2) + b] >> (4 * (p4 % 2)) & 15, high = line[128 + b] >> (2 * p4) & 3;
            to[k] = (float)((low | high << 4) - 32) * scale;
        }
    }
}

/* Norms and quantizes all tokens: a single one by every thread for itself, more of them once, with a barrier. */
static activation prepare(model *m, int tid, int tokens, const float *x, int stride, int k, const float *weight,
                          const matrix *w) {
    int n = m->threads.n;
    activation a = tokens == 1 ? m->own[tid].act : m->shared;
    lay_out(&a, tokens, limbs_for(w), k, w);
    a.how = m->how;
    int first = tokens == 1 ? 0 : part_of(tokens, tid, n), end = tokens == 1 ? 1 : part_of(tokens, tid + 1, n);
    for (int t = first; t < end; t++)
        quantize(&a, t, x + (size_t)t * (size_t)stride, k, weight, m->eps, w);
    if (tokens > 1) barrier(&m->threads, tid);
    return a;
}

static void step(void *arg, int tid) {
    model *m = arg;
    const shape *c = &m->c;
    pool *threads = &m->threads;
    scratch *s = &m->own[tid];
    int tokens = m->batch * m->T;
    if (tokens > 1) {
        for (int t = part_of(tokens, tid, threads->n); t < part_of(tokens, tid + 1, threads->n); t++)
            embed(&m->wte, m->tokens[(t / m->T) * m->stride + t % m->T], m->x + (size_t)t * (size_t)m->Cp);
        barrier(threads, tid);
    }
    for (int l = 0; l < c->n_layer; l++) {
        layer *w = &m->layers[l];
        activation a = prepare(m, tid, tokens, m->x, m->Cp, c->n_embd, w->attn_norm, &w->q);
        product((const matrix *[]){&w->q, &w->k, &w->v}, 3, &a, s, threads, tid, STORE, 0,
                m->qkv, m->QKV, m->QKV);
        barrier(threads, tid);
        attention(m, l, tid);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->att, m->Cp, c->n_embd, w->attn_sub_norm, &w->o);
        product((const matrix *[]){&w->o}, 1, &a, s, threads, tid, ADD, 0, m->x, m->Cp, m->Cp);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->x, m->Cp, c->n_embd, w->mlp_norm, &w->gate);
        product((const matrix *[]){&w->gate, &w->up}, 2, &a, s, threads, tid, GATE, c->relu2,
                m->h, m->Fp, m->Fp);
        barrier(threads, tid);
        a = prepare(m, tid, tokens, m->h, m->Fp, c->n_ff, w->mlp_sub_norm, &w->down);
        product((const matrix *[]){&w->down}, 1, &a, s, threads, tid, ADD, 0, m->x, m->Cp, m->Cp);
        barrier(threads, tid);
    }
    if (!m->logits) return;
    int rows = m->all_logits ? tokens : m->batch; /* tokens with logits, */
    int apart = m->all_logits ? 1 : m->T;         /* and from one to the next */
    const float *first = m->x + (size_t)(apart - 1) * (size_t)m->Cp;
    activation a = prepare(m, tid, rows, first, m->Cp * apart, c->n_embd, m->norm, &m->head);
    product((const matrix *[]){&m->head}, 1, &a, s, threads, tid, STORE, 0, m->logits,
            c->vocab_size, c->vocab_size);
}

/* ---------------------------------------------------------------- what Python calls ----------------------------- */
const char *bitgpt_isa(void) {
    get_ready();
    return has_tiles ? "amx" : ISA;
}

static void free_matrix(matrix *w) { free(w->scale); }

static void free_work(model *m) {
    free(m->x), free(m->qkv), free(m->att), free(m->h);
    m->x = m->qkv = m->att = m->h = NULL;
    free_activation(&m->shared);
    for (int i = 0; i < m->threads.n; i++) {
        scratch *s = &m->own[i];
        free_activation(&s->act);
        free(s->acc), free(s->facc), free(s->expanded), free(s->scores), free(s->rows), free(s->more), free(s->block);
        *s = (scratch){0};
    }
    m->reserved = 0;
}

void bitgpt_destroy(model *m) {
    if (!m) return;
    pool_stop(&m->threads);
    free_work(m);
    release(&m->cache[0]), release(&m->cache[1]), release(&m->parts), release(&m->done);
    free(m->norm);
    for (int l = 0; m->layers && l < m->c.n_layer; l++) {
        layer *w = &m->layers[l];
        free(w->attn_norm), free(w->q_norm), free(w->k_norm), free(w->attn_sub_norm);
        free(w->mlp_norm), free(w->mlp_sub_norm);
        matrix *all[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
        for (int i = 0; i < 7; i++) free_matrix(all[i]);
    }
    free(m->layers);
    if (!m->c.tied) free_matrix(&m->head);
    free_matrix(&m->wte);
    free(m);
}

/* NULL without memory. cos, sin: (block_size, D / 2), kept by the caller as long as the model. */
model *bitgpt_create(const shape *c, float eps, const float *cos, const float *sin) {
    model *m = alloc_zeroed(sizeof(model));
    if (!m) return NULL;
    get_ready();
    m->c = *c;
    m->eps = eps, m->cos = cos, m->sin = sin;
    m->D = c->n_embd / c->n_head;
    m->width[0] = m->D, m->width[1] = round_up(m->D, c->kv_bf16 ? 32 : 16);
    m->Cp = round_up(c->n_embd, 16);
    m->Fp = round_up(c->n_ff, 16);
    m->QKV = m->Cp + 2 * round_up(c->n_kv_head * m->D, 16);
    m->S = round_up(c->block_size, 64);
    m->layers = alloc_zeroed(sizeof(layer) * (size_t)c->n_layer);
    pool_start(&m->threads, c->threads);
    if (!m->layers) { bitgpt_destroy(m); return NULL; }
    return m;
}

/* A matrix by number: 0 wte, 1 lm_head, then q k v o gate up down of the layer. `w` is used in place: the caller keeps
 * it. scale: n floats, or one for all rows. -1 without memory. */
int bitgpt_matrix(model *m, int which, int l, int kind, int n, int k, const uint8_t *w, const float *scale,
                  int scales) {
    layer *y = &m->layers[l];
    matrix *all[] = {&m->wte, &m->head, &y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down}, *to = all[which];
    int panels = (n + ROWS - 1) / ROWS;
    bool one = scales <= 1; /* then nothing is read beside the weights, which costs more than its bytes */
    *to = (matrix){kind, n, k, panels, (k + COLS[kind] - 1) / COLS[kind], w, NULL, one ? 0 : ROWS};
    to->scale = alloc_zeroed(sizeof(float) * (size_t)(one ? ROWS : panels * ROWS));
    if (!to->scale) return -1;
    for (int i = 0; i < (one ? ROWS : n); i++) to->scale[i] = scale ? scale[one ? 0 : i] : 1.0f;
    if (which == 0 && m->c.tied) m->head = *to;
    return 0;
}

/* A norm by number: 0 final, then attn_norm, attn sub_norm, mlp_norm, mlp sub_norm, q_norm,
 * k_norm of the layer. Copied. */
int bitgpt_norm(model *m, int which, int l, int n, const float *weight) {
    layer *y = &m->layers[l];
    float **all[] = {&m->norm, &y->attn_norm, &y->attn_sub_norm, &y->mlp_norm, &y->mlp_sub_norm,
                     &y->q_norm, &y->k_norm};
    float *copy = alloc_zeroed(sizeof(float) * (size_t)round_up(n, 16));
    if (!copy) return -1;
    memcpy(copy, weight, sizeof(float) * (size_t)n);
    *all[which] = copy;
    return 0;
}

/* Empties the cache, for `batch` sequences. -1 without memory. */
int bitgpt_reset(model *m, int batch) {
    m->length = 0;
    m->batch = batch;
    size_t n = (size_t)batch, rows = n * (size_t)m->c.n_head * (size_t)spans(m->S);
    bool ok = grow(&m->parts, sizeof(float) * rows * (size_t)row_width(m)) &&
              grow(&m->done, sizeof(atomic_int) * n * (size_t)m->c.n_kv_head);
    for (int i = 0; i < 2; i++)
        ok = ok && grow(&m->cache[i], heads(m) * (size_t)m->S * (size_t)m->width[i] * number_bytes(m));
    return ok ? 0 : -1;
}

static bool reserve(model *m, int tokens) {
    int rows = tokens > 2 * m->batch ? tokens : 2 * m->batch; /* the head takes two a sequence */
    if (tokens <= m->reserved && rows <= m->reserved_rows) return true;
    free_work(m);
    const shape *c = &m->c;
    size_t n = (size_t)tokens;
    int widest = c->n_ff > c->n_embd ? c->n_ff : c->n_embd;
    bool bf16 = !c->ternary || m->head.kind == BF16;
    m->x = alloc_zeroed(sizeof(float) * n * (size_t)m->Cp);
    m->qkv = alloc_zeroed(sizeof(float) * n * (size_t)m->QKV);
    m->att = alloc_zeroed(sizeof(float) * n * (size_t)m->Cp);
    m->h = alloc_zeroed(sizeof(float) * n * (size_t)m->Fp);
    bool ok = m->x && m->qkv && m->att && m->h && make_activation(&m->shared, tokens == 1 ? 0 : rows, widest, bf16);
    for (int i = 0; i < m->threads.n; i++) {
        scratch *s = &m->own[i];
        ok = make_activation(&s->act, 2, widest, bf16) && ok;
        s->acc = alloc_zeroed(sizeof(int32_t) * 32 * (size_t)(SUMS + rows + MOST_TOKENS));
        s->facc = alloc_zeroed(sizeof(float) * 32 * (size_t)(SUMS + rows + FTOKENS));
        s->expanded = alloc_zeroed((size_t)(EXPAND_COLS + 80) * ROWS * GEMM_PANELS);
        s->scores = alloc_zeroed(sizeof(float) * TOGETHER * APART);
        s->rows = alloc_zeroed(sizeof(float) * TOGETHER * (size_t)row_width(m));
        s->more = alloc_zeroed(sizeof(float) * TOGETHER * (size_t)row_width(m));
        s->block = alloc_zeroed(c->kv_bf16 ? sizeof(float) * 64 * (size_t)m->width[1] : 0);
        ok = ok && s->acc && s->facc && s->expanded && s->scores && s->rows && s->more && s->block;
    }
    if (ok) m->reserved = tokens, m->reserved_rows = rows;
    return ok;
}

#define TRIES 5 /* the least of so many is told from another way's, whatever else the machine does at times */

/* The way to ask for weights in the next step: by turns until all have been tried, then the fastest; prompts are no
 * part of it. Results do not depend on it. */
static enum prefetch pick_prefetch(const tuning *y) {
    if (y->tries < TRIES * N_PREFETCH) return (enum prefetch)(y->tries % N_PREFETCH);
    int best = 0;
    for (int how = 1; how < N_PREFETCH; how++) if (y->least[how] < y->least[best]) best = how;
    return (enum prefetch)best;
}

static void record_time(tuning *y, enum prefetch how, double seconds) {
    if (y->tries < N_PREFETCH || seconds < y->least[how]) y->least[how] = seconds;
    if (y->tries < TRIES * N_PREFETCH) y->tries++;
}

/* tokens (batch, T) after what is in the cache; logits (batch, vocab_size) of the last position, or (batch, T,
 * vocab_size) of up to CHUNK tokens. The caller has made sure that length + T <= block_size. -1 without memory, -2 for
 * a token that is not in the vocabulary. */
int bitgpt_forward(model *m, const int64_t *tokens, int T, int all_logits, float *logits) {
    for (int i = 0; i < m->batch * T; i++) if (tokens[i] < 0 || tokens[i] >= m->c.vocab_size) return -2;
    /* tiles of AMX wait for activations that do not stay in an L2 cache of 2 MB */
    int together = has_tiles && m->c.ternary && !all_logits && CHUNK * m->Fp > 2 << 20 ? CHUNK / 2 : CHUNK;
    int most = m->batch > together ? 1 : together / m->batch, chunk = m->batch * (T < most ? T : most);
    if (!reserve(m, all_logits ? 2 * chunk : chunk)) return -1; /* the head takes two rows a token */
    m->all_logits = all_logits;
    for (int t = 0; t < T; t += most) {
        m->tokens = tokens + t;
        m->stride = T;
        m->T = T - t < most ? T - t : most;
        m->from = m->length;
        m->logits = t + m->T == T ? logits : NULL;
        tuning *y = T == 1 && m->batch <= FEW_ROWS ? &m->tunings[m->batch] : NULL;
        m->how = y ? pick_prefetch(y) : NEAR;
        double start = seconds();
        if (m->batch * m->T == 1) embed(&m->wte, tokens[t], m->x);
        pool_run(&m->threads, step, m);
        if (y) record_time(y, m->how, seconds() - start);
        m->length += m->T;
    }
    return 0;
}

const int bitgpt_shape_bytes = sizeof(shape); /* of cpu.py's Shape as well */

int bitgpt_threads(const model *m) { return m->threads.n; }

int64_t bitgpt_count_invalid(int kind, const uint8_t *w, int64_t bytes) { return count_invalid(kind, w, bytes); }
