//go:build !faults

package disk

// FaultsEnabled tells a build that can be made to fail from one that cannot.
const FaultsEnabled = false

func step(string, string) error { return nil }
