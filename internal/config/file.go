package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// value is what the file says for a key, and where.
type value struct {
	text string
	line int
}

// parse reads the file's text. It walks the nodes itself, because a decoder
// into a struct takes a number for text and names Go types in its errors.
func parse(file string, content []byte) (map[string]value, error) {
	dec := yaml.NewDecoder(bytes.NewReader(content))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil // empty, or nothing but comments
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, file, err)
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: %s: a second document after the first", ErrInvalid, file)
	}
	r := reader{file: file, known: map[string]Key{}, values: map[string]value{}}
	for _, k := range Keys() {
		r.known[k.Name] = k
	}
	if err := r.section("", doc.Content[0]); err != nil {
		return nil, err
	}
	return r.values, nil
}

type reader struct {
	file   string
	known  map[string]Key
	values map[string]value
}

func (r *reader) refuse(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("%w: %s:%d: %s", ErrInvalid, r.file, n.Line, fmt.Sprintf(format, args...))
}

// section reads a mapping; prefix is "" or a section's name and a dot.
func (r *reader) section(prefix string, n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil // "hub:" with nothing below it, or a file of "---"
	}
	if n.Kind != yaml.MappingNode {
		if prefix == "" {
			return r.refuse(n, "the file is not a list of KEY: VALUE")
		}
		return r.refuse(n, "%s is not a section of KEY: VALUE", prefix[:len(prefix)-1])
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Tag != "!!str" {
			return r.refuse(key, "a key that is not a word; known keys: %s", names())
		}
		name := prefix + key.Value
		if first, twice := seen[name]; twice {
			return r.refuse(key, "%s is set twice, first on line %d", name, first)
		}
		seen[name] = key.Line
		if prefix == "" && slices.Contains(sections(), name) {
			if err := r.section(name+".", val); err != nil {
				return err
			}
			continue
		}
		k, ok := r.known[name]
		if !ok || strings.Contains(key.Value, ".") {
			return r.refuse(key, "unknown key %.100q; known keys: %s", name, names())
		}
		if err := r.scalar(k, val); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) scalar(k Key, n *yaml.Node) error {
	want, tag := "text", "!!str"
	switch k.kind {
	case number:
		want, tag = "a number", "!!int"
	case boolean:
		want, tag = "true or false", "!!bool"
	}
	if n.Kind != yaml.ScalarNode || n.Tag != tag {
		return r.refuse(n, "%s takes %s", k.Name, want)
	}
	if n.Value == "" {
		return r.refuse(n, "%s is empty; leave the key out for the default", k.Name)
	}
	r.values[k.Name] = value{text: n.Value, line: n.Line}
	return nil
}
