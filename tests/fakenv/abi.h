/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of the NVIDIA driver's user ABI that the fake answers: escape numbers, parameter
 * layouts, classes, controls and status codes. Sizes that differ between branches are not here
 * but in branch.c. Written from the open driver's public headers as data, not copied from them;
 * branch.c says how the figures were checked.
 */
#ifndef FAKENV_ABI_H
#define FAKENV_ABI_H
#include <stddef.h>
#include <stdint.h>

/* ---- status codes (NV_STATUS) ---- */
enum {
    NV_OK = 0x00,
    NV_ERR_GPU_IS_LOST = 0x0f,
    NV_ERR_ILLEGAL_ACTION = 0x16,
    NV_ERR_INSERT_DUPLICATE_NAME = 0x19,
    NV_ERR_INSUFFICIENT_PERMISSIONS = 0x1b,
    NV_ERR_INVALID_ADDRESS = 0x1e,
    NV_ERR_INVALID_ARGUMENT = 0x1f,
    NV_ERR_INVALID_CLASS = 0x22,
    NV_ERR_INVALID_CLIENT = 0x23,
    NV_ERR_INVALID_DEVICE = 0x26,
    NV_ERR_INVALID_OBJECT_PARENT = 0x36,
    NV_ERR_INVALID_OFFSET = 0x37,
    NV_ERR_INVALID_PARAM_STRUCT = 0x3a,
    NV_ERR_INVALID_STATE = 0x40,
    NV_ERR_NO_MEMORY = 0x51,
    NV_ERR_NOT_SUPPORTED = 0x56,
    NV_ERR_OBJECT_NOT_FOUND = 0x57,
    NV_ERR_TIMEOUT = 0x65,
    NV_ERR_UVM_ADDRESS_IN_USE = 0x68,
};

/* ---- escapes: _IOWR('F', nr, size) ---- */
enum {
    NV_ESC_RM_FREE = 0x29,
    NV_ESC_RM_CONTROL = 0x2a,
    NV_ESC_RM_ALLOC = 0x2b,
    NV_ESC_RM_DUP_OBJECT = 0x34,
    NV_ESC_RM_SHARE = 0x35,
    NV_ESC_CARD_INFO = 200,
    NV_ESC_REGISTER_FD = 201,
    NV_ESC_CHECK_VERSION_STR = 210,
    NV_ESC_IOCTL_XFER_CMD = 211,
    NV_ESC_ATTACH_GPUS_TO_FD = 212,
    NV_ESC_SYS_PARAMS = 214,
    NV_ESC_WAIT_OPEN_COMPLETE = 218,
};

struct nvos00 { uint32_t root, parent, object, status; };
struct nvos21 {
    uint32_t root, parent, object, hclass;
    uint64_t params;
    uint32_t params_size, status;
};
struct nvos64 {
    uint32_t root, parent, object, hclass;
    uint64_t params, rights;
    uint32_t params_size, flags, status, pad;
};
struct nvos54 {
    uint32_t client, object, cmd, flags;
    uint64_t params;
    uint32_t params_size, status;
};
struct nvos55 { uint32_t client, parent, object, src_client, src_object, flags, status; };
struct nvos57 {
    uint32_t client, object, target, access_mask;
    uint16_t type;
    uint8_t action, pad;
    uint32_t status;
};
struct nv_xfer { uint32_t cmd, size; uint64_t ptr; };
struct nv_version { uint32_t cmd, reply; char version[64]; };
struct nv_pci { uint32_t domain; uint8_t bus, slot, function, pad; uint16_t vendor, device; };
struct nv_card {
    uint8_t valid, pad[3];
    struct nv_pci pci;
    uint32_t gpu_id;
    uint16_t irq, pad2;
    uint64_t reg_address, reg_size, fb_address, fb_size;
    uint32_t minor;
    uint8_t name[10];
};
_Static_assert(sizeof(struct nvos21) == 32 && sizeof(struct nvos64) == 48, "RM_ALLOC");
_Static_assert(sizeof(struct nvos54) == 32 && sizeof(struct nvos55) == 28, "CONTROL, DUP");
_Static_assert(sizeof(struct nvos57) == 24 && sizeof(struct nv_version) == 72, "SHARE, VERSION");
_Static_assert(sizeof(struct nv_card) == 72, "CARD_INFO");

/* ---- classes ---- */
enum {
    NV01_ROOT = 0x0,
    NV01_ROOT_NON_PRIV = 0x1,
    NV01_ROOT_CLIENT = 0x41,
    NV01_MEMORY_LOCAL_USER = 0x40,
    NV01_DEVICE_0 = 0x80,
    NV20_SUBDEVICE_0 = 0x2080,
    FERMI_VASPACE_A = 0x90f1,
    KEPLER_CHANNEL_GROUP_A = 0xa06c,
    FERMI_CONTEXT_SHARE_A = 0x9067,
    TURING_CHANNEL_GPFIFO = 0xc46f,
    AMPERE_CHANNEL_GPFIFO = 0xc56f,
    HOPPER_CHANNEL_GPFIFO = 0xc86f,
    BLACKWELL_CHANNEL_GPFIFO_A = 0xc96f,
    BLACKWELL_CHANNEL_GPFIFO_B = 0xca6f,
    TURING_USERMODE_A = 0xc461,
    HOPPER_USERMODE_A = 0xc661,
};
enum { NV2080_ENGINE_GRAPHICS = 1, NV2080_ENGINE_COPY0 = 9 };

struct nv_tsg_params { uint32_t error, ecc_error, vaspace, engine, vgpu; };
_Static_assert(sizeof(struct nv_tsg_params) == 20, "NV_CHANNEL_GROUP_ALLOCATION_PARAMETERS");
/* NV_CHANNEL_ALLOC_PARAMS, leading part; 360 bytes in all before 570, 368 from there on */
struct nv_channel_params {
    uint32_t error, buffer;
    uint64_t gpfifo_offset;
    uint32_t gpfifo_entries, flags, context_share, vaspace;
    uint32_t userd_memory[8];
    uint64_t userd_offset[8];
    uint32_t engine, cid;
};
_Static_assert(offsetof(struct nv_channel_params, engine) == 128, "engineType");
enum { NV_MEMORY_SIZE_OFFSET = 64 }; /* NV_MEMORY_ALLOCATION_PARAMS.size */

/* ---- controls ---- */
enum {
    CTRL_GPU_GET_ATTACHED_IDS = 0x201,
    CTRL_GPU_GET_PROBED_IDS = 0x214,
    CTRL_GPU_ATTACH_IDS = 0x215,
    CTRL_EXPORT_OBJECT_TO_FD = 0x3d05,
    CTRL_IMPORT_OBJECT_FROM_FD = 0x3d06,
    CTRL_GPU_GET_UUID_INFO = 0x274,
    CTRL_SET_CHANNEL_PROPERTIES = 0x80170f,
    CTRL_STOP_RUNLIST = 0x801711,
    CTRL_START_RUNLIST = 0x801712,
    CTRL_GPU_GET_NAME_STRING = 0x20800110,
    CTRL_GPU_GET_GID_INFO = 0x2080014a,
    CTRL_DISABLE_CHANNELS = 0x2080110b,
    CTRL_RUNLIST_SET_SCHED_POLICY = 0x20801115,
    CTRL_DISABLE_USERMODE_CHANNELS = 0x20801117,
    CTRL_SET_CTXSW_PREEMPTION_MODE = 0x20801210,
    CTRL_GET_CTXSW_MODES = 0x20801235,
    CTRL_RC_SOFT_DISABLE_WATCHDOG = 0x20802210,
    CTRL_TSG_SCHEDULE = 0xa06c0101,
    CTRL_TSG_BIND = 0xa06c0102,
    CTRL_TSG_SET_TIMESLICE = 0xa06c0103,
    CTRL_TSG_GET_TIMESLICE = 0xa06c0104,
    CTRL_TSG_PREEMPT = 0xa06c0105,
    CTRL_TSG_GET_INFO = 0xa06c0106,
    CTRL_TSG_SET_INTERLEAVE = 0xa06c0107,
    CTRL_TSG_MAKE_REALTIME = 0xa06c0110,
    CTRL_TSG_INTERNAL_SCHEDULE = 0xa06c0201,
    CTRL_TSG_INTERNAL_TIMESLICE = 0xa06c0202,
    CTRL_CHANNEL_SCHEDULE = 0xa06f0103,
    CTRL_CHANNEL_BIND = 0xa06f0104,
    CTRL_CHANNEL_SET_INTERLEAVE = 0xa06f0109,
    CTRL_RESTART_RUNLIST = 0xa06f0111,
    CTRL_STOP_CHANNEL = 0xa06f0112,
    CTRL_GET_WORK_SUBMIT_TOKEN = 0xc36f0108,
};
struct ctrl_disable {
    uint8_t disable, pad0[3];
    uint32_t count;
    uint8_t only_scheduling, rewind_gp_put, pad1[6];
    uint64_t preempt_event;
    uint32_t client[64], channel[64];
};
_Static_assert(sizeof(struct ctrl_disable) == 536, "FIFO_DISABLE_CHANNELS");
struct ctrl_preempt { uint8_t wait, manual_timeout, pad[2]; uint32_t timeout_us; };
struct ctrl_ctxsw_set { uint32_t flags, channel, gfxp, cilp, rest[4]; };
struct ctrl_ctxsw_get { uint32_t channel, zcull, pm, smpc, cilp, gfxp; };
_Static_assert(sizeof(struct ctrl_ctxsw_set) == 32 && sizeof(struct ctrl_ctxsw_get) == 24, "CTXSW");
struct ctrl_rm_object { uint32_t type, device, parent, object; };
struct ctrl_export { struct ctrl_rm_object object; int32_t fd; uint32_t flags; };
struct ctrl_import { int32_t fd; struct ctrl_rm_object object; };

/* ---- UVM: plain numbers ---- */
enum {
    UVM_REGISTER_GPU_VASPACE = 25,
    UVM_REGISTER_CHANNEL = 27,
    UVM_UNREGISTER_CHANNEL = 28,
    UVM_MAP_EXTERNAL_ALLOCATION = 33,
    UVM_FREE = 34,
    UVM_REGISTER_GPU = 37,
    UVM_UNMAP_EXTERNAL = 66,
    UVM_CREATE_EXTERNAL_RANGE = 73,
    UVM_MAP_EXTERNAL_SPARSE = 74,
    UVM_MM_INITIALIZE = 75,
    UVM_INITIALIZE = 0x30000001,
    UVM_DEINITIALIZE = 0x30000002,
};
struct uvm_initialize { uint64_t flags; uint32_t status, pad; };
struct uvm_mm_initialize { int32_t uvm_fd; uint32_t status; };
struct uvm_range { uint64_t base, length; uint32_t status, pad; };            /* 73 */
struct uvm_gpu_range { uint64_t base, length; uint8_t uuid[16]; uint32_t status, pad; }; /* 66, 74 */
struct uvm_free { uint64_t base; uint32_t status, pad; };
struct uvm_register_gpu {
    uint8_t uuid[16], numa_enabled, pad[3];
    int32_t numa_node, ctl_fd;
    uint32_t client, partition, status;
};
struct uvm_register_vaspace { uint8_t uuid[16]; int32_t ctl_fd; uint32_t client, vaspace, status; };
struct uvm_register_channel {
    uint8_t uuid[16];
    int32_t ctl_fd;
    uint32_t client, channel, pad;
    uint64_t base, length;
    uint32_t status, pad2;
};
struct uvm_unregister_channel { uint32_t client, channel, status; };
struct uvm_gpu_attributes { uint8_t uuid[16]; uint32_t mapping, caching, format, bits, compression; };
struct uvm_map_head { uint64_t base, length, offset; }; /* then attributes[32 or 256], then: */
struct uvm_map_tail { uint64_t count; int32_t ctl_fd; uint32_t client, memory, status; };
_Static_assert(sizeof(struct uvm_register_gpu) == 40 && sizeof(struct uvm_register_channel) == 56, "");
_Static_assert(sizeof(struct uvm_gpu_attributes) == 36 && sizeof(struct uvm_map_tail) == 24, "UVM map");

#endif
