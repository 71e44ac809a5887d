/* SPDX-License-Identifier: Apache-2.0
 *
 * Modules and launches. Any image loads; the functions in it are the kernels of cuda_kernels.c.
 * Graphs are a sequence of kernel nodes, enough to test that launches through a graph are seen.
 */
#include <stdlib.h>
#include <string.h>

#include "cuda_fake.h"

typedef const struct kernel *CUfunction;
struct node { struct fakenv_entry entry; struct node *next; };
typedef struct graph { struct node *first, **last; } *CUgraph;
typedef struct {
    CUfunction function;
    unsigned grid[3], block[3], shared;
    void **params, **extra;
    void *kernel, *context;
} CUDA_KERNEL_NODE_PARAMS;

API CUresult cuModuleLoadData(void **module, const void *image)
{
    static char the_module;
    *module = &the_module;
    return image ? cuda_ready() : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned options, int *keys, void **values)
{
    return cuModuleLoadData(module, image);
}

API CUresult cuModuleUnload(void *module)
{
    return cuda_ready();
}

API CUresult cuModuleGetFunction(CUfunction *function, void *module, const char *name)
{
    for (unsigned i = 0; i < kernel_count; i++)
        if (strcmp(kernels[i].name, name) == 0) {
            *function = &kernels[i];
            return cuda_ready();
        }
    return CUDA_ERROR_NOT_FOUND;
}

API CUresult cuLibraryLoadData(void **library, const void *code, void *a, void **b, unsigned c, void *d, void **e,
                               unsigned f)
{
    return cuModuleLoadData(library, code);
}

API CUresult cuLibraryUnload(void *library)
{
    return cuda_ready();
}

API CUresult cuLibraryGetKernel(CUfunction *kernel, void *library, const char *name)
{
    return cuModuleGetFunction(kernel, library, name);
}

API CUresult cuKernelGetFunction(CUfunction *function, CUfunction kernel)
{
    *function = kernel;
    return cuda_ready();
}

API CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction function)
{
    *value = attribute == 0 ? 1024 : 0; /* threads per block; the rest is nothing */
    return cuda_ready();
}

API CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value)
{
    return cuda_ready();
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int size, size_t shared)
{
    *blocks = 1;
    return cuda_ready();
}

static CUresult encode(CUfunction f, void **params, void **extra, struct fakenv_entry *e)
{
    if (!f || f < kernels || f >= kernels + kernel_count)
        return CUDA_ERROR_INVALID_HANDLE;
    if (extra || (f->args && !params))
        return CUDA_ERROR_INVALID_VALUE;
    *e = (struct fakenv_entry){.op = (uint32_t)(f - kernels)};
    for (unsigned i = 0; i < f->args; i++)
        memcpy(&e->arg[i], params[i], sizeof e->arg[i]);
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, CUstream stream, void **params, void **extra)
{
    struct context *ctx;
    struct fakenv_entry e;
    CUresult r = cuda_current(&ctx);
    if (r || (r = encode(f, params, extra, &e)))
        return r;
    if (!gx || !gy || !gz || !bx || !by || !bz)
        return CUDA_ERROR_INVALID_VALUE;
    struct stream *s = cuda_stream(ctx, stream);
    return stream_issue(s, s->channel, &e, NULL, 0);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra)
{
    return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                          c->stream, params, extra);
}

/* ---- graphs ---- */

API CUresult cuGraphCreate(CUgraph *graph, unsigned flags)
{
    CUgraph g = calloc(1, sizeof *g);
    if (!g)
        return CUDA_ERROR_OUT_OF_MEMORY;
    g->last = &g->first;
    *graph = g;
    return cuda_ready();
}

API CUresult cuGraphAddKernelNode_v2(struct node **node, CUgraph graph, struct node *const *after, size_t count,
                                     const CUDA_KERNEL_NODE_PARAMS *p)
{
    struct node *n = calloc(1, sizeof *n);
    if (!n)
        return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult r = encode(p->function, p->params, p->extra, &n->entry);
    if (r) {
        free(n);
        return r;
    }
    *graph->last = n; /* nodes run in the order they were added, which respects any dependencies */
    graph->last = &n->next;
    *node = n;
    return CUDA_SUCCESS;
}

API CUresult cuGraphDestroy(CUgraph graph)
{
    for (struct node *n; (n = graph->first);) {
        graph->first = n->next;
        free(n);
    }
    free(graph);
    return CUDA_SUCCESS;
}

API CUresult cuGraphInstantiateWithFlags(CUgraph *executable, CUgraph graph, unsigned long long flags)
{
    CUresult r = cuGraphCreate(executable, 0);
    for (struct node *n = graph->first; n && !r; n = n->next) {
        struct node *copy = calloc(1, sizeof *copy);
        if (!copy)
            return CUDA_ERROR_OUT_OF_MEMORY;
        copy->entry = n->entry;
        *(*executable)->last = copy;
        (*executable)->last = &copy->next;
    }
    return r;
}

API CUresult cuGraphExecDestroy(CUgraph executable)
{
    return cuGraphDestroy(executable);
}

API CUresult cuGraphLaunch(CUgraph executable, CUstream stream)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (r)
        return r;
    struct stream *s = cuda_stream(ctx, stream);
    for (struct node *n = executable->first; n && !r; n = n->next)
        r = stream_issue(s, s->channel, &n->entry, NULL, 0);
    return r;
}
