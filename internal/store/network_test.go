package store

import (
	"strings"
	"testing"
)

// The lines are what /proc/self/mountinfo says of NFS mounts on Linux 6.1.
func TestWhatNFSMountsLack(t *testing.T) {
	t.Parallel()
	const begin, end = "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,", "hard,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.2,addr=10.0.0.1"
	for options, want := range map[string]string{
		begin + end + ",local_lock=none": "lookupcache=none",
		begin + "acregmin=0,acregmax=0,acdirmin=0,acdirmax=0," + end + ",local_lock=none":                       "lookupcache=none",
		begin + end + ",lookupcache=none,local_lock=none":                                                       "actimeo=0",
		begin + "acregmin=0,acregmax=0,acdirmin=0,acdirmax=0," + end + ",lookupcache=pos,local_lock=none":       "lookupcache=none",
		begin + "acregmin=0,acregmax=0,acdirmin=0,acdirmax=0," + end + ",lookupcache=none,local_lock=flock":     "locks of this node",
		"rw,vers=3,nolock,noac," + end + ",lookupcache=none,local_lock=all":                                     "locks of this node",
		begin + "acregmin=0,acregmax=0,acdirmin=0,acdirmax=0," + end + ",lookupcache=none,local_lock=none":      "",
		"rw,sync,vers=3,noac," + end + ",lookupcache=none,local_lock=none":                                      "",
		begin + "acregmin=0,acregmax=0,acdirmin=30,acdirmax=60," + end + ",lookupcache=none,local_lock=none":    "actimeo=0",
		begin + "acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,soft," + end + ",lookupcache=none,local_lock=none": "",
	} {
		got := nfsLacks(options)
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want something about %q", options, got, want)
		}
	}
}
