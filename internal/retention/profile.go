package retention

import (
	"embed"
	"fmt"
	"path"
	"slices"
	"strings"
)

//go:embed profiles/*.yaml
var profiles embed.FS

// Profiles are the names of the policies that come with Larder.
func Profiles() []string {
	entries, err := profiles.ReadDir("profiles")
	if err != nil {
		panic(err) // embedded
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), path.Ext(e.Name())))
	}
	return names
}

// ProfileText is a profile as a policy file, with comments.
func ProfileText(name string) ([]byte, error) {
	if !slices.Contains(Profiles(), name) {
		return nil, fmt.Errorf("there is no profile %.100q; there are %s", name, strings.Join(Profiles(), ", "))
	}
	return profiles.ReadFile("profiles/" + name + ".yaml")
}

// Profile is a policy that comes with Larder.
func Profile(name string) (*Policy, error) {
	text, err := ProfileText(name)
	if err != nil {
		return nil, err
	}
	p, err := Parse("profile "+name, text)
	if err != nil {
		return nil, err
	}
	p.Profile = name
	for key := range p.origins {
		p.origins[key] = origin{profile: name}
	}
	return p, nil
}
