// Package store keeps one copy of every file of every model in an OCI image
// layout, shared by all processes of a node (and, on a shared file system, by
// several nodes) without a daemon.
//
//	DIR/oci-layout, index.json       the layout; index.json lists all references
//	DIR/index.json.copy              a second copy, for whoever restores a lost list
//	DIR/blobs/sha256/HEX             files, manifests, configs; mode 0444
//	DIR/ingest/KEY[.progress]        a blob being written; flocked by its writer
//	DIR/leases/NODE/ID.lease         digests that a running process relies on
//	DIR/leases/NODE/HEX              versions that a node's volumes use
//	DIR/usage/NODE/HEX               its time of change: when last mounted
//	DIR/usage/NODE/HEX.pulled        likewise: when last pulled or named again
//	DIR/trash/ID/                    what was removed, until it is emptied
//	DIR/lock                         the lock below
//
// # Locks
//
// DIR/lock is held shared by whoever is about to rely on something that is in
// the store, and exclusively by whoever changes index.json or removes blobs:
//
//   - shared: write a digest into a lease, then look whether its blob is there.
//     Shared: resolve a version, then record that it is used.
//   - exclusive: read index.json, change it, replace it. Exclusive: gather all
//     roots and leases, mark, and move to the trash what nothing reaches.
//
// So a digest that is looked up after it was leased cannot be collected: either
// the collector sees the lease, or the look-up sees the blob gone. Nobody
// holds the lock while bytes are fetched, copied or hashed.
//
// A lease is a file that its owner keeps locked with flock. It ends when the
// owner ends, however that comes about, and never by the clock. An ingest file
// is locked likewise, so that one process at a time writes a blob.
//
// Order of taking: a volume's lock (package volume), then an ingest, then
// DIR/lock. Nobody who holds DIR/lock waits for another lock.
//
// # What holds after a crash
//
// Publishing goes: bytes of each blob fsynced, renamed to its digest, folder
// fsynced; config and manifest the same way; index.json replaced last. A crash
// before the last step leaves blobs that no reference reaches (they are reused
// by the next attempt) or a partial file in ingest/ (resumed). It never leaves
// a reference to something incomplete. The copy of the list is replaced after
// the list: a crash between leaves it one change behind.
//
// Removing goes the other way: the record of the removal in trash/ID, then
// index.json without the references, then manifests, then files moved to
// trash/ID. A crash leaves blobs that no reference reaches and a record that
// Recover finishes from.
package store
