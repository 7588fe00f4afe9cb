package huggingface

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Token finds the user's token as the huggingface_hub client does: HF_TOKEN,
// HUGGING_FACE_HUB_TOKEN, then the file HF_TOKEN_PATH, by default token in
// HF_HOME. It is empty where there is none, or where
// HF_HUB_DISABLE_IMPLICIT_TOKEN forbids to use it. getenv is os.Getenv.
func Token(getenv func(string) string) (string, error) {
	switch strings.ToUpper(getenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")) {
	case "1", "ON", "YES", "TRUE":
		return "", nil
	}
	for _, name := range []string{"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} {
		if t := cleanToken(getenv(name)); t != "" {
			return t, nil
		}
	}
	path := tokenPath(getenv)
	if path == "" {
		return "", nil
	}
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the hub's token: %w; make it readable, or set HF_TOKEN (HF_HUB_DISABLE_IMPLICIT_TOKEN=1 does without)", err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxTokenBytes+1))
	if err != nil {
		return "", fmt.Errorf("read the hub's token: %w", err)
	}
	if len(content) > maxTokenBytes {
		return "", fmt.Errorf("read the hub's token: %s is longer than %d bytes, it is no token", path, maxTokenBytes)
	}
	return cleanToken(string(content)), nil
}

const maxTokenBytes = 4096

func tokenPath(getenv func(string) string) string {
	home := getenv("HOME")
	expand := func(p string) string {
		if home != "" && (p == "~" || strings.HasPrefix(p, "~/")) {
			p = home + p[1:]
		}
		return os.Expand(p, func(name string) string {
			if v := getenv(name); v != "" {
				return v
			}
			return "$" + name
		})
	}
	if p := getenv("HF_TOKEN_PATH"); p != "" {
		return expand(p)
	}
	if p := getenv("HF_HOME"); p != "" {
		return filepath.Join(expand(p), "token")
	}
	if p := getenv("XDG_CACHE_HOME"); p != "" {
		return filepath.Join(expand(p), "huggingface", "token")
	}
	if home == "" {
		return ""
	}
	return filepath.Join(home, ".cache", "huggingface", "token")
}

func cleanToken(t string) string {
	return strings.TrimSpace(strings.NewReplacer("\r", "", "\n", "").Replace(t))
}

// checkToken refuses what cannot be sent in a header. The error does not show
// the token.
func checkToken(t string) error {
	if strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return errors.New("the hub's token contains a character that no token has (a space, a quote of the wrong kind?); set HF_TOKEN to the token alone")
	}
	return nil
}
