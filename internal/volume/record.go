package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// Errors that callers tell apart.
var (
	ErrNotFound = errors.New("no such volume")
	ErrDamaged  = errors.New("volume record is damaged")
	ErrInUse    = errors.New("volume is in use")
)

// recordFormat is the version of the records' format that this code writes.
const recordFormat = 1

// record is STATE/volumes/NAME.json.
type record struct {
	Format  int               `json:"format"`
	Name    string            `json:"name"`
	Options map[string]string `json:"options"`
	Created time.Time         `json:"created"`
	// Pinned are the versions that a volume of scope "volume" began with, in
	// the order of its models: what was written over one version is never laid
	// over another.
	Pinned []digest.Digest `json:"pinned,omitempty"`
	// Manual: made for one manual mount, with which it goes.
	Manual bool `json:"manual,omitempty"`
}

// mountRecord is STATE/mounts/BOOT/NAME/ID.json.
type mountRecord struct {
	Format   int             `json:"format"`
	Volume   string          `json:"volume"`
	ID       string          `json:"id"`
	Refs     int             `json:"refs"`             // calls of Mount less calls of Unmount
	Manual   bool            `json:"manual"`           // made by a person, who also ends it
	Target   string          `json:"target"`           // as the process that mounts calls it
	Place    string          `json:"place,omitempty"`  // what the mount covers; see mounttable.Namespace.Place
	Device   string          `json:"device,omitempty"` // MAJOR:MINOR of the mount, once it is made
	Upper    string          `json:"upper,omitempty"`  // folder of the upper, see overlay.NewUpper
	View     string          `json:"view"`
	Versions []digest.Digest `json:"versions"`
	Time     time.Time       `json:"time"`
	// Called is when Mount was last called, in seconds since boot; Seen tells
	// that some other mount namespace has shown the mount since.
	Called int64 `json:"called"`
	Seen   bool  `json:"seen"`
	// Leaving: Unmount was called for the last time, and what is left to do
	// waits for somebody who still holds the mount.
	Leaving bool `json:"leaving,omitempty"`
	// Absorb: what the run wrote is not deleted before Absorb has looked at it.
	Absorb bool `json:"absorb,omitempty"`
}

// viewRecord is STATE/views/BOOT.ID/KEY.json: the versions that a view shows.
type viewRecord struct {
	Versions []digest.Digest `json:"versions"`
}

// Folders below STATE.
const (
	viewsDir  = "views"
	uppersDir = "uppers"
	mntDir    = "mnt"

	droppedDir = "dropped" // below uppers
)

const (
	recordSuffix   = ".json"
	removingSuffix = ".removing"
)

func (m *Manager) recordPath(name string) string {
	return filepath.Join(m.state, "volumes", name+recordSuffix)
}

func (m *Manager) readRecord(name string) (record, error) {
	data, err := os.ReadFile(m.recordPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, m.notFound(name)
	}
	if err != nil {
		return record{}, fmt.Errorf("read volume %s: %w", name, err)
	}
	r, err := parseRecord(data)
	if err == nil && r.Name != name {
		err = fmt.Errorf("it is the record of %.100q", r.Name)
	}
	if err != nil {
		hint := "restore the file from a backup, or remove the volume and create it again"
		if upper := m.volumeUpper(name); exists(upper) {
			hint = fmt.Sprintf("restore the file from a backup; or move %s away, which is what containers wrote, then remove the volume and create it again", upper)
		}
		return record{}, &damagedError{text: fmt.Sprintf("volume %s: its record %s cannot be read", name, m.recordPath(name)), err: err, hint: hint}
	}
	return r, nil
}

// damagedError is about a file of the state that cannot be read.
type damagedError struct {
	text string
	err  error
	hint string
}

func (e *damagedError) Error() string        { return e.text + ": " + e.err.Error() }
func (e *damagedError) Is(target error) bool { return target == ErrDamaged }
func (e *damagedError) Unwrap() error        { return e.err }

// Hint says what to do next.
func (e *damagedError) Hint() string { return e.hint }

// parseRecord reads a volume's record strictly: what it does not understand it
// does not guess.
func parseRecord(data []byte) (record, error) {
	var r record
	if err := decodeStrict(data, &r); err != nil {
		return r, err
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("its format is %d, this program reads %d", r.Format, recordFormat)
	}
	for _, d := range r.Pinned {
		if err := d.Validate(); err != nil {
			return r, fmt.Errorf("pinned version %.100q: %w", d, err)
		}
	}
	return r, CheckName(r.Name)
}

func parseMountRecord(data []byte) (mountRecord, error) {
	var r mountRecord
	if err := decodeStrict(data, &r); err != nil {
		return r, err
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("its format is %d, this program reads %d", r.Format, recordFormat)
	}
	return r, errors.Join(CheckName(r.Volume), CheckID(r.ID))
}

func decodeStrict(data []byte, into any) error {
	if len(data) == 0 {
		return errors.New("the file is empty")
	}
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("text after the JSON object")
	}
	return nil
}

func (m *Manager) writeRecord(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write volume %s: %w", r.Name, err)
	}
	if err := atomicfile.Write(m.recordPath(r.Name), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write volume %s: %w", r.Name, err)
	}
	return nil
}

func (m *Manager) mountsDir(name string) string {
	return filepath.Join(m.state, "mounts", m.boot, name)
}

func (m *Manager) mountRecordPath(name, id string) string {
	return filepath.Join(m.mountsDir(name), id+recordSuffix)
}

// readMount reads one mount's record of this boot. ok is false when there is
// none.
func (m *Manager) readMount(name, id string) (r mountRecord, ok bool, err error) {
	path := m.mountRecordPath(name, id)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, fmt.Errorf("read mount %s of volume %s: %w", id, name, err)
	}
	r, err = parseMountRecord(data)
	if err == nil && (r.Volume != name || r.ID != id) {
		err = fmt.Errorf("it is the record of mount %.100q of volume %.100q", r.ID, r.Volume)
	}
	if err != nil {
		return r, false, &damagedError{
			text: fmt.Sprintf("mount %s of volume %s: its record %s cannot be read", id, name, path), err: err,
			hint: fmt.Sprintf("stop the containers of volume %s, remove the file, and restart larder-plugin, which takes the mount away", name),
		}
	}
	// The state may have another path where the record was written.
	switch {
	case r.Upper == "":
	case filepath.Base(filepath.Dir(filepath.Dir(r.Upper))) == uppersDir:
		r.Upper = m.volumeUpper(name)
	default:
		r.Upper = m.runUpper(name, id)
	}
	return r, true, nil
}

// readMounts reads all mounts of a volume of this boot. With the error, it
// gives those whose records can be read.
func (m *Manager) readMounts(name string) ([]mountRecord, error) {
	entries, err := os.ReadDir(m.mountsDir(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read mounts of volume %s: %w", name, err)
	}
	var out []mountRecord
	var damaged error
	for _, e := range entries {
		id, isRecord := strings.CutSuffix(e.Name(), recordSuffix)
		if !isRecord || atomicfile.IsTemp(e.Name()) {
			continue
		}
		r, ok, err := m.readMount(name, id)
		if err != nil {
			damaged = errors.Join(damaged, err)
		} else if ok {
			out = append(out, r)
		}
	}
	return out, damaged
}

// writeMount replaces a mount's record. It is not made durable: a reboot makes
// it void, and until then the page cache is as good as the disk.
func (m *Manager) writeMount(r mountRecord) error {
	r.Format = recordFormat
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write mount %s of volume %s: %w", r.ID, r.Volume, err)
	}
	if err := disk.MkdirAll(m.mountsDir(r.Volume), 0o700); err != nil {
		return fmt.Errorf("write mount %s of volume %s: %w", r.ID, r.Volume, err)
	}
	if err := atomicfile.WriteVolatile(m.mountRecordPath(r.Volume, r.ID), data, 0o600); err != nil {
		return fmt.Errorf("write mount %s of volume %s: %w", r.ID, r.Volume, err)
	}
	return nil
}

func (m *Manager) dropMount(r mountRecord) error {
	if err := ignoreAbsent(disk.Remove(m.mountRecordPath(r.Volume, r.ID))); err != nil {
		return fmt.Errorf("drop mount %s of volume %s: %w", r.ID, r.Volume, err)
	}
	return nil
}

// names lists the volumes, sorted. A folder that cannot be read is an error,
// never an empty list.
func (m *Manager) names(suffix string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(m.state, "volumes"))
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok && CheckName(name) == nil {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out, nil
}

type notFoundError struct {
	name string
	near []string
}

func (m *Manager) notFound(name string) error {
	e := &notFoundError{name: name}
	if all, err := m.names(recordSuffix); err == nil {
		for _, have := range all {
			if len(e.near) < 3 && (strings.HasPrefix(have, name) || strings.HasPrefix(name, have)) {
				e.near = append(e.near, have)
			}
		}
	}
	return e
}

func (e *notFoundError) Error() string        { return fmt.Sprintf("no such volume: %s", e.name) }
func (e *notFoundError) Is(target error) bool { return target == ErrNotFound }

// Hint says what to do next.
func (e *notFoundError) Hint() string {
	if len(e.near) > 0 {
		return "did you mean " + strings.Join(e.near, ", ") + "?"
	}
	return "larder volume ls lists the volumes"
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
