/* SPDX-License-Identifier: Apache-2.0
 * The structures of blksnap and dattobd as C declarations of our own, against which test_uapi.py holds stasis's.
 * Generations are told apart by a prefix; the names of the fields are those of the Python structures.
 */
#include <linux/ioctl.h>
#include <linux/types.h>

struct common_Uuid { __u8 b[16]; };
struct common_FilterName { __u8 name[32]; };
struct common_FilterCtl { __u8 name[32]; __u32 cmd; __u32 optlen; __u64 opt; };
struct common_CbtInfo {
	__u64 device_capacity; __u32 block_size; __u32 block_count;
	struct common_Uuid generation_id; __u8 changes_number;
};
struct common_CbtMap { __u32 offset; __u32 length; __u64 buffer; };
struct common_Sectors { __u64 offset; __u64 count; };
struct common_CbtDirty { __u32 count; __u64 dirty_sectors; };
struct common_SnapshotAdd { struct common_Uuid id; };
struct common_SnapshotInfo { __s32 error_code; __u8 image[32]; };
struct common_Version { __u16 major; __u16 minor; __u16 revision; __u16 build; };
struct common_SnapshotCollect { __u32 count; __u64 ids; };
struct common_SnapshotEvent {
	struct common_Uuid id; __u32 timeout_ms; __u32 code; __s64 time_label; __u8 data[4096 - 32];
};
struct common_EventCorrupted { __u32 dev_id_mj; __u32 dev_id_mn; __s32 err_code; };
struct common_EventSpace { __u64 requested_nr_sect; };

struct current_FilterAttach { __u8 name[32]; __u64 opt; __u32 optlen; };
struct current_SnapshotCreate {
	__u64 diff_storage_limit_sect; __u64 diff_storage_filename; struct common_Uuid id;
};

struct v7_SnapshotCreateV6 { __u64 diff_storage_limit_sect; __u32 diff_storage_fd; struct common_Uuid id; };

struct v5_SnapshotAppendStorage {
	struct common_Uuid id; __u64 bdev_path; __u32 bdev_path_size; __u32 count; __u64 ranges;
};

struct v2_BlkSnapDev { __u32 mj; __u32 mn; };
struct v2_CbtInfo {
	struct v2_BlkSnapDev dev_id; __u32 blk_size; __u64 device_capacity; __u32 blk_count;
	struct common_Uuid generation_id; __u8 snap_number;
};
struct v2_TrackerCollect { __u32 count; struct v2_CbtInfo *cbt_info_array; };
struct v2_TrackerReadCbtBitmap { struct v2_BlkSnapDev dev_id; __u32 offset; __u32 length; __u8 *buff; };
struct v2_TrackerMarkDirtyBlocks {
	struct v2_BlkSnapDev dev_id; __u32 count; struct common_Sectors *dirty_blocks_array;
};
struct v2_SnapshotCreate { __u32 count; struct v2_BlkSnapDev *dev_id_array; struct common_Uuid id; };
struct v2_SnapshotAppendStorage {
	struct common_Uuid id; struct v2_BlkSnapDev dev_id; __u32 count; struct common_Sectors *ranges;
};
struct v2_SnapshotCollect { __u32 count; struct common_Uuid *ids; };
struct v2_ImageInfo { struct v2_BlkSnapDev orig_dev_id; struct v2_BlkSnapDev image_dev_id; };
struct v2_SnapshotCollectImages {
	struct common_Uuid id; __u32 count; struct v2_ImageInfo *image_info_array;
};

struct val7_BdevFilterName { __u64 devpath; __u8 name[32]; };
struct val7_BdevFilterCtl { __u64 devpath; __u8 name[32]; __u32 cmd; __u32 optlen; __u64 opt; };

struct dattobd_Minor { unsigned int minor; };
struct dattobd_SetupParams {
	char *bdev; char *cow; unsigned long fallocated_space; unsigned long cache_size; unsigned int minor;
};
struct dattobd_ReloadParams { char *bdev; char *cow; unsigned long cache_size; unsigned int minor; };
struct dattobd_TransitionSnapParams { char *cow; unsigned long fallocated_space; unsigned int minor; };
struct dattobd_ReconfigureParams { unsigned long cache_size; unsigned int minor; };
struct dattobd_ExpandCowFileParams { __u64 size; unsigned int minor; };
struct dattobd_ReconfigureAutoExpandParams { __u64 step_size; __u64 reserved_space; unsigned int minor; };
struct dattobd_Info {
	unsigned int minor; unsigned long state; int error; unsigned long cache_size;
	unsigned long long falloc_size; unsigned long long seqid; char uuid[16];
	char cow[4096]; char bdev[4096]; unsigned long long version; unsigned long long nr_changed_blocks;
};

#define REQUESTS(X) \
	X(current, BLKFILTER_ATTACH, _IOWR(0x12, 142, struct current_FilterAttach)) \
	X(current, BLKFILTER_DETACH, _IOWR(0x12, 143, struct common_FilterName)) \
	X(current, BLKFILTER_CTL, _IOWR(0x12, 144, struct common_FilterCtl)) \
	X(current, IOCTL_BLKSNAP_VERSION, _IOR('V', 0, struct common_Version)) \
	X(current, IOCTL_BLKSNAP_SNAPSHOT_CREATE, _IOWR('V', 1, struct current_SnapshotCreate)) \
	X(current, IOCTL_BLKSNAP_SNAPSHOT_DESTROY, _IOW('V', 2, struct common_Uuid)) \
	X(current, IOCTL_BLKSNAP_SNAPSHOT_TAKE, _IOW('V', 3, struct common_Uuid)) \
	X(current, IOCTL_BLKSNAP_SNAPSHOT_COLLECT, _IOR('V', 4, struct common_SnapshotCollect)) \
	X(current, IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, _IOR('V', 5, struct common_SnapshotEvent)) \
	X(v7, BLKFILTER_ATTACH, _IOWR(0x12, 140, struct common_FilterName)) \
	X(v7, BLKFILTER_DETACH, _IOWR(0x12, 141, struct common_FilterName)) \
	X(v7, BLKFILTER_CTL, _IOWR(0x12, 142, struct common_FilterCtl)) \
	X(v5, IOCTL_BLKSNAP_VERSION, _IOW('V', 0, struct common_Version)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_CREATE, _IOW('V', 1, struct common_Uuid)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_DESTROY, _IOR('V', 2, struct common_Uuid)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE, _IOW('V', 3, struct v5_SnapshotAppendStorage)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_TAKE, _IOR('V', 4, struct common_Uuid)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_COLLECT, _IOW('V', 5, struct common_SnapshotCollect)) \
	X(v5, IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, _IOW('V', 6, struct common_SnapshotEvent)) \
	X(v2, IOCTL_BLK_SNAP_VERSION, _IOW('V', 0, struct common_Version)) \
	X(v2, IOCTL_BLK_SNAP_TRACKER_REMOVE, _IOW('V', 1, struct v2_BlkSnapDev)) \
	X(v2, IOCTL_BLK_SNAP_TRACKER_COLLECT, _IOW('V', 2, struct v2_TrackerCollect)) \
	X(v2, IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, _IOR('V', 3, struct v2_TrackerReadCbtBitmap)) \
	X(v2, IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS, _IOR('V', 4, struct v2_TrackerMarkDirtyBlocks)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_CREATE, _IOW('V', 5, struct v2_SnapshotCreate)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, _IOR('V', 6, struct common_Uuid)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, _IOW('V', 7, struct v2_SnapshotAppendStorage)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_TAKE, _IOR('V', 8, struct common_Uuid)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT, _IOW('V', 9, struct v2_SnapshotCollect)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, _IOW('V', 10, struct v2_SnapshotCollectImages)) \
	X(v2, IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT, _IOW('V', 11, struct common_SnapshotEvent)) \
	X(v2, IOCTL_BLK_SNAP_MOD, _IOW('V', 32, char[40])) \
	X(v2, IOCTL_BLK_SNAP_SETLOG, _IOW('V', 33, char[24])) \
	X(v2, IOCTL_BLK_SNAP_GET_SECTOR_STATE, _IOW('V', 34, char[24])) \
	X(val7, BDEVFILTER_ATTACH, _IOWR('F', 140, struct val7_BdevFilterName)) \
	X(val7, BDEVFILTER_DETACH, _IOWR('F', 141, struct val7_BdevFilterName)) \
	X(val7, BDEVFILTER_CTL, _IOWR('F', 142, struct val7_BdevFilterCtl)) \
	X(val7, IOCTL_BLKSNAP_MOD, _IOR('V', 32, char[40])) \
	X(val7, IOCTL_BLKSNAP_SETLOG, _IOW('V', 33, char[24])) \
	X(val7, IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE, _IOW('V', 34, struct v5_SnapshotAppendStorage)) \
	X(dattobd, IOCTL_SETUP_SNAP, _IOW(0x91, 1, struct dattobd_SetupParams)) \
	X(dattobd, IOCTL_RELOAD_SNAP, _IOW(0x91, 2, struct dattobd_ReloadParams)) \
	X(dattobd, IOCTL_RELOAD_INC, _IOW(0x91, 3, struct dattobd_ReloadParams)) \
	X(dattobd, IOCTL_DESTROY, _IOW(0x91, 4, unsigned int)) \
	X(dattobd, IOCTL_TRANSITION_INC, _IOW(0x91, 5, unsigned int)) \
	X(dattobd, IOCTL_TRANSITION_SNAP, _IOW(0x91, 6, struct dattobd_TransitionSnapParams)) \
	X(dattobd, IOCTL_RECONFIGURE, _IOW(0x91, 7, struct dattobd_ReconfigureParams)) \
	X(dattobd, IOCTL_DATTOBD_INFO, _IOR(0x91, 8, struct dattobd_Info)) \
	X(dattobd, IOCTL_GET_FREE, _IOR(0x91, 9, int)) \
	X(dattobd, IOCTL_EXPAND_COW_FILE, _IOW(0x91, 10, struct dattobd_ExpandCowFileParams)) \
	X(dattobd, IOCTL_RECONFIGURE_AUTO_EXPAND, _IOW(0x91, 11, struct dattobd_ReconfigureAutoExpandParams))
