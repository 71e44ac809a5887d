/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of the NVIDIA driver's user ABI that libvalve reads: facts found equal in the open
 * kernel modules 535, 550, 560, 565, 570, 575, 580, 590 and 595 (rm.py names the releases).
 */
#ifndef VALVE_NV_ABI_H
#define VALVE_NV_ABI_H

#include <linux/ioctl.h>
#include <stdint.h>

#define NV_IOCTL_TYPE 'F'
enum nv_escape {
    NV_ESC_FREE = 0x29,
    NV_ESC_CONTROL = 0x2a,
    NV_ESC_ALLOC = 0x2b,
    NV_ESC_DUP_OBJECT = 0x34,
    NV_ESC_XFER = 211, /* wraps another escape */
};

struct nv_free { uint32_t root, parent, object, status; };
struct nv_alloc { /* the short form; the long one has the same first 24 bytes */
    uint32_t root, parent, object, hclass;
    uint64_t params;
    uint32_t params_size, status;
};
struct nv_alloc_wide {
    uint32_t root, parent, object, hclass;
    uint64_t params, rights;
    uint32_t params_size, flags, status, pad;
};
struct nv_control {
    uint32_t client, object, command, flags;
    uint64_t params;
    uint32_t params_size, status;
};
struct nv_dup { uint32_t client, parent, object, source_client, source, flags, status; };
struct nv_xfer { uint32_t number, size; uint64_t params; };
_Static_assert(sizeof(struct nv_alloc) == 32 && sizeof(struct nv_alloc_wide) == 48, "RM_ALLOC");
_Static_assert(sizeof(struct nv_control) == 32 && sizeof(struct nv_free) == 16, "CONTROL, FREE");
_Static_assert(sizeof(struct nv_dup) == 28 && sizeof(struct nv_xfer) == 16, "DUP, XFER");

#define NV_OK 0u
#define NV_ERR_INSUFFICIENT_PERMISSIONS 0x1bu

enum nv_class { NV_ROOT = 0x0, NV_ROOT_NON_PRIV = 0x1, NV_ROOT_CLIENT = 0x41, NV_DEVICE = 0x80,
                NV_SUBDEVICE = 0x2080, NV_CHANNEL_GROUP = 0xa06c };
/* Every GPFIFO class of every generation so far ends so: 0xc46f Turing ... 0xca6f Blackwell. */
static inline int nv_is_channel(uint32_t hclass) { return hclass > 0x4000 && (hclass & 0xff) == 0x6f; }
#define NV_GROUP_ENGINE 12    /* offset of engineType in NV_CHANNEL_GROUP_ALLOCATION_PARAMETERS */
#define NV_CHANNEL_ENGINE 128 /* and in NV_CHANNEL_ALLOC_PARAMS */
enum { NV_ENGINE_GRAPHICS_FIRST = 1, NV_ENGINE_GRAPHICS_LAST = 8 };

enum nv_command {
    NV_DISABLE_CHANNELS = 0x2080110b,
    NV_GROUP_SCHEDULE = 0xa06c0101,
    NV_CHANNEL_SCHEDULE = 0xa06f0103,
};
#define NV_CHANNELS_PER_CALL 64u
struct nv_disable {
    uint8_t disable, pad0[3];
    uint32_t count;
    uint8_t only_scheduling, rewind, pad1[6]; /* always 0: they would leave work running, or drop it */
    uint64_t event;
    uint32_t client[NV_CHANNELS_PER_CALL], channel[NV_CHANNELS_PER_CALL];
};
_Static_assert(sizeof(struct nv_disable) == 536, "FIFO_DISABLE_CHANNELS");

#define UVM_INITIALIZE 0x30000001u

#endif
