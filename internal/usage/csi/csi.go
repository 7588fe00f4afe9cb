// Package csi knows which volumes of Larder the kubelet has published to pods.
//
// It reads what the kubelet writes beside each volume for itself, in
// KUBELET/pods/UID/volumes/kubernetes.io~csi/NAME/vol_data.json (Kubernetes,
// pkg/volume/csi: csi_mounter.go names the fields, csi_util.go writes the
// file). It is there before the driver is asked to publish, and goes after it
// has unpublished.
package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/usage"
)

// Driver is the name of Larder's CSI driver.
const Driver = "csi.larder.dev"

// Source knows what one kubelet has published.
type Source struct {
	pods   string
	places func() (usage.Places, error)
}

// New makes a source of the kubelet whose folder is given, /var/lib/kubelet as
// a rule.
func New(kubelet string, places func() (usage.Places, error)) *Source {
	return &Source{pods: filepath.Join(kubelet, "pods"), places: places}
}

// Name implements usage.Source.
func (s *Source) Name() string { return "csi" }

// Uses implements usage.Source.
func (s *Source) Uses(ctx context.Context) ([]usage.Use, error) {
	pods, err := os.ReadDir(s.pods)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("kubelet's %s: %w", s.pods, usage.ErrAbsent)
	}
	if err != nil {
		return nil, fmt.Errorf("kubelet: %w", err)
	}
	var published []volume
	for _, pod := range pods {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		of, err := s.volumes(pod.Name())
		if err != nil {
			return nil, fmt.Errorf("kubelet: pod %s: %w", pod.Name(), err)
		}
		published = append(published, of...)
	}
	places, err := s.places()
	if err != nil {
		return nil, err
	}
	var uses []usage.Use
	for _, v := range published {
		versions, err := v.versions(places)
		if err != nil {
			return nil, err
		}
		for _, d := range versions {
			uses = append(uses, usage.Use{Version: d, By: fmt.Sprintf("volume %s of pod %s", v.name, v.pod)})
		}
	}
	return uses, nil
}

// volume is one CSI volume of a pod, of whatever driver.
type volume struct {
	pod, name, dir string
	data           volumeData
}

// volumeData is what we need of vol_data.json.
type volumeData struct {
	DriverName   string `json:"driverName"`
	VolumeHandle string `json:"volumeHandle"`
	SpecVolID    string `json:"specVolID"`
}

func (s *Source) volumes(pod string) ([]volume, error) {
	dir := filepath.Join(s.pods, pod, "volumes", "kubernetes.io~csi")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a pod without such volumes, or one that has gone
	}
	if err != nil {
		return nil, err
	}
	var out []volume
	for _, e := range entries {
		v := volume{pod: pod, name: e.Name(), dir: filepath.Join(dir, e.Name())}
		if v.data, err = readData(filepath.Join(v.dir, "vol_data.json")); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// readData reads a vol_data.json; where there is none, nothing is known of the
// volume but its folder.
func readData(path string) (volumeData, error) {
	var d volumeData
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return d, fmt.Errorf("read %s: %w", path, err)
	}
	if d.DriverName == "" || d.VolumeHandle == "" && d.SpecVolID == "" {
		return d, fmt.Errorf("read %s: it does not say which driver's volume it is", path)
	}
	return d, nil
}

// versions gives what a volume shows: by the names that a driver may have
// recorded it under, and by its folder.
func (v volume) versions(places usage.Places) ([]digest.Digest, error) {
	out, _, err := places.AtPath(filepath.Join(v.dir, "mount"))
	if err != nil {
		return nil, err
	}
	if v.data.DriverName == Driver {
		for _, name := range []string{v.data.VolumeHandle, v.data.SpecVolID} {
			found, _, err := places.OfVolume(name)
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}
