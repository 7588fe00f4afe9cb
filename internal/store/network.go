package store

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/mounttable"
)

// lustreMagic is LL_SUPER_MAGIC of Lustre, which x/sys does not have.
const lustreMagic = 0x0bd00bd0

// checkNetwork tells whether the store is on a file system that other nodes may
// have mounted, and refuses NFS that is mounted so that they see each other's
// leases and removals late.
func (s *Store) checkNetwork() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("%s: %w", s.dir, err)
	}
	switch int64(st.Type) {
	case unix.NFS_SUPER_MAGIC:
		m, err := mounttable.Of(s.dir)
		if err != nil {
			return err
		}
		if missing := nfsLacks(m.VFSOptions); missing != "" {
			return fmt.Errorf("%s is on NFS (%s), %s: nodes that share it would see each other's pulls and removals late or not at all; mount it with lookupcache=none,actimeo=0 and without nolock and local_lock", s.dir, m.Mountpoint, missing)
		}
		s.network = true
	case unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC,
		unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC, lustreMagic:
		s.network = true
	}
	return nil
}

// nfsLacks says what options of an NFS mount lack or have too much, as the
// kernel lists them (nfs(5)): names and attributes must not be cached, locks
// must be the server's. Empty: they are right.
func nfsLacks(options string) string {
	has := func(want ...string) bool {
		list := strings.Split(options, ",")
		return !slices.ContainsFunc(want, func(o string) bool { return !slices.Contains(list, o) })
	}
	switch {
	case has("nolock"), has("local_lock=all"), has("local_lock=flock"):
		return "mounted with locks of this node alone"
	case !has("lookupcache=none"):
		return "mounted without lookupcache=none"
	case !has("noac") && !has("acregmin=0", "acregmax=0", "acdirmin=0", "acdirmax=0"):
		return "mounted without actimeo=0"
	}
	return ""
}
