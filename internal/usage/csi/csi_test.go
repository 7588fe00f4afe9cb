package csi

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

const pod = "0c4ea9b6-8f0c-4c3e-9d5c-0d3f1c2b7a11"

// publish writes what the kubelet writes for a volume: an object of texts.
func publish(t *testing.T, kubelet, pod, name, data string) (dir string) {
	t.Helper()
	dir = filepath.Join(kubelet, "pods", pod, "volumes/kubernetes.io~csi", name)
	if err := os.MkdirAll(filepath.Join(dir, "mount"), 0o750); err != nil {
		t.Fatal(err)
	}
	if data != "" {
		if err := os.WriteFile(filepath.Join(dir, "vol_data.json"), []byte(data+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	ours   = `{"attachmentID":"csi-1","driverName":"csi.larder.dev","nodeName":"n1","specVolID":"models","volumeHandle":"qwen","volumeLifecycleMode":"Persistent"}`
	theirs = `{"attachmentID":"csi-2","driverName":"ebs.csi.aws.com","nodeName":"n1","specVolID":"qwen","volumeHandle":"qwen","volumeLifecycleMode":"Persistent"}`
)

func TestSource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		kubelet := filepath.Join(n.Root, "kubelet")
		publish(t, kubelet, pod, "data", theirs)
		data := filepath.Join(kubelet, "pods", pod, "volumes/kubernetes.io~csi/models/vol_data.json")
		spoil := func(text string) func(*testing.T) func() {
			return func(t *testing.T) func() { return usagetest.Write(t, data, text) }
		}
		return usagetest.Subject{
			Source: New(kubelet, n.Volumes.Places),
			Use: func(t *testing.T) func() {
				n.Create(t, "qwen")
				dir := publish(t, kubelet, pod, "models", ours)
				return func() {
					if err := os.RemoveAll(dir); err != nil {
						t.Error(err)
					}
				}
			},
			Faults: map[string]func(*testing.T) func(){
				"vol_data.json is empty":          spoil(""),
				"vol_data.json is cut short":      spoil(ours[:40]),
				"vol_data.json says nothing":      spoil("{}"),
				"vol_data.json is of other types": spoil(`{"driverName":["csi.larder.dev"]}`),
				"the volume's record is damaged": func(t *testing.T) func() {
					return usagetest.Write(t, n.Root+"/node/volumes/qwen.json", "")
				},
				"pods is no folder": func(t *testing.T) func() {
					pods := filepath.Join(kubelet, "pods")
					if err := os.Rename(pods, pods+".away"); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(pods, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					return func() {
						if err := os.Remove(pods); err != nil {
							t.Error(err)
						}
						if err := os.Rename(pods+".away", pods); err != nil {
							t.Error(err)
						}
					}
				},
				"the kubelet's folder is absent": func(t *testing.T) func() {
					if err := os.Rename(kubelet, kubelet+".away"); err != nil {
						t.Fatal(err)
					}
					return func() {
						if err := os.Rename(kubelet+".away", kubelet); err != nil {
							t.Error(err)
						}
					}
				},
			},
		}
	})
}

// places are made-up answers.
type places map[string]digest.Digest

func (p places) OfVolume(name string) ([]digest.Digest, bool, error) { return p.get("volume " + name) }
func (p places) AtPath(path string) ([]digest.Digest, bool, error)   { return p.get(path) }
func (p places) get(key string) ([]digest.Digest, bool, error) {
	d, ok := p[key]
	if !ok {
		return nil, false, nil
	}
	return []digest.Digest{d}, true, nil
}

func TestPublishedVolumesByNameAndByFolder(t *testing.T) {
	t.Parallel()
	kubelet := t.TempDir()
	a, b := digest.FromString("a"), digest.FromString("b")
	ephemeral := `{"driverName":"csi.larder.dev","specVolID":"inline","volumeHandle":"csi-9af","volumeLifecycleMode":"Ephemeral"}`
	halfway := publish(t, kubelet, pod, "halfway", "")
	other := publish(t, kubelet, pod, "data", theirs)
	publish(t, kubelet, pod, "models", ours)
	publish(t, kubelet, pod, "inline", ephemeral)
	publish(t, kubelet, "another-pod", "none", theirs)
	p := places{"volume qwen": a, "volume inline": b, filepath.Join(halfway, "mount"): b, filepath.Join(other, "sub"): b}
	got, err := New(kubelet, func() (usage.Places, error) { return p, nil }).Uses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []usage.Use{
		{Version: b, By: "volume halfway of pod " + pod},
		{Version: b, By: "volume inline of pod " + pod},
		{Version: a, By: "volume models of pod " + pod},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("uses (-want +got):\n%s", diff)
	}
}
