// Package volume keeps volumes and their mounts, for the Docker driver, the
// CSI driver and the command line alike.
//
// It keeps no state in memory but caches: each call reads the records of the
// volume it is about, under that volume's lock, so that several processes can
// work on one STATE folder and a killed one has nothing to tell.
//
//	STATE/id                           which state this is, 32 hex digits
//	STATE/volumes/NAME.json            a volume; durable
//	STATE/volumes/NAME.removing        a volume whose writes are being deleted
//	STATE/mounts/BOOT/NAME/ID.json     a mount of a volume; volatile
//	STATE/views/BOOT.ID/KEY, KEY.json  a view, and the versions it shows; ID is the state's
//	STATE/mnt/NAME/ID                  where a mount is
//	STATE/uppers/run/NAME/ID           what one run wrote; dropped with it
//	STATE/uppers/volume/NAME           what all runs of the volume wrote; kept
//	STATE/uppers/absorb/NAME/KEY       what a run wrote that Absorb is to look at
//	STATE/uppers/absorb/NAME/KEY.json  what that run was shown; durable
//	STATE/uppers/dropped/NAME@KEY      what is being deleted; flocked by who does it
//	STATE/locks/XX                     flock by hash of the volume's name
//	STATE/locks/absorb                 flock of who absorbs
//	STATE/locks/manual                 flock of who mounts at a folder of a person's choice
//
// What a reboot makes void lies in a folder named by the kernel's boot id and
// is not fsynced: after a power cut no such record is ever read.
//
// One state may have several paths: in a managed plugin another one than on
// the host. So mounts are known by the name of their view's folder, and records
// of uppers by what lies below the state.
//
// # What counts as mounted
//
// An engine's calls do not balance: it mounts twice and unmounts once after it
// was killed, mounts and unmounts the same ID for a copy while the container
// runs, and forgets calls. A record counts the calls of its (volume, ID); the
// kernel's mount tables decide where the count and they differ. A mount that
// covers the same folder of the same file system as the host's own is a copy of
// that, and nobody's use; every other one is a use, whatever its path.
//
// Nothing a container wrote is deleted, or mounted a second time, while any
// mount namespace shows the mount, or while the kernel has the upper in use
// where no table shows it (overlay.UpperInUse). A process that does not see all
// processes of the host takes away no mount but those that an engine has
// unmounted.
//
// # What holds after a crash
//
// Mount: record, folders, mount(2). A record without a mount is finished by
// the next Mount of that ID or dropped by Reap. Unmount: unmount, upper (dropped,
// or set aside for Absorb: its record, then a new name), folder, record; a repeat
// or Reap finishes it. Remove: the record is renamed to NAME.removing first and
// dropped last; until it is dropped, Sweep and Reap go on with what it covers.
// To drop an upper is to give it another name, by which it is deleted when the
// volume's lock is free: by the call that dropped it, else by Reap. An upper
// of scope volume without either record is never deleted: its record may have
// been lost. A volume made for a manual mount and left without one is removed
// by Sweep.
package volume
