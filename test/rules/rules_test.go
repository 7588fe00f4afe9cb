// Package rules keeps two rules of the whole repository that no compiler
// knows: which package may import which, and who may change the disk. It reads
// the source; golangci-lint checks the same where it is installed.
package rules

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/larder-project/larder/"

// order lists the packages of the product, the first ones at the bottom: a
// package imports only what stands before it. A new package gets its place
// here, and a place that needs an import the other way round is a design
// question, not a line to move.
var order = []string{
	"internal/disk",
	"internal/atomicfile",
	"internal/clock",
	"internal/service",
	"internal/pattern",
	"internal/reference",
	"internal/modelpack",
	"internal/config",
	"internal/progress",
	"internal/source",
	"internal/source/directory",
	"internal/source/huggingface",
	"internal/mounttable",
	"internal/store",
	"internal/pull",
	"internal/view",
	"internal/overlay",
	"internal/space",
	"internal/usage",
	"internal/usage/docker",
	"internal/usage/containerd",
	"internal/usage/gpu",
	"internal/usage/csi",
	"internal/retention",
	"internal/gc",
	"internal/volume",
	"internal/usage/sources",
	"internal/cleanup",
	"internal/doctor",
	"plugin",
	"sidecar",
	"cmd/larder",
	"cmd/larder-gpu",
}

// forTests are packages that only tests may import, wherever they stand. They
// start engines, serve made-up hubs and mount what they like. Below internal/
// the name of their folder, or of one above it, ends in "test": hubtest,
// sourcetest; testenv is one too.
func forTests(pkg string) bool {
	if pkg == "test" || strings.HasPrefix(pkg, "test/") {
		return true
	}
	for _, folder := range strings.Split(pkg, "/")[1:] {
		if folder == "testenv" || strings.HasSuffix(folder, "test") {
			return true
		}
	}
	return false
}

// apart are pairs that order alone would allow and the design does not: what
// is said here of a package holds for those below it too.
var apart = map[string][]string{
	"internal/store":     {"internal/source"},
	"internal/view":      {"internal/source", "internal/store", "internal/pull"},
	"internal/overlay":   {"internal/source", "internal/store", "internal/pull"},
	"internal/reference": {"internal/disk", "internal/atomicfile"},
	"internal/modelpack": {"internal/disk", "internal/atomicfile"},
	"internal/retention": {"internal/disk", "internal/atomicfile", "internal/store"},
	"internal/pattern":   {"internal/disk", "internal/atomicfile"},
	"internal/usage":     {"internal/store", "internal/pull", "internal/source"},
}

// mayImport says whether pkg may import dep, both written without the module,
// or why not.
func mayImport(pkg, dep string) error {
	if forTests(pkg) {
		return nil
	}
	if forTests(dep) {
		return fmt.Errorf("%s is for tests", dep)
	}
	at, of := slices.Index(order, pkg), slices.Index(order, dep)
	switch {
	case at < 0:
		return fmt.Errorf("%s has no place in the order of packages (test/rules)", pkg)
	case of < 0:
		return fmt.Errorf("%s has no place in the order of packages (test/rules)", dep)
	case of >= at:
		return fmt.Errorf("%s comes before %s", pkg, dep)
	}
	for _, no := range apart[pkg] {
		if dep == no || strings.HasPrefix(dep, no+"/") {
			return fmt.Errorf("%s is kept apart from %s", pkg, no)
		}
	}
	return nil
}

// changesDisk are the functions by which a program changes a file system.
// Packages other than internal/disk and those for tests call none of them.
var changesDisk = map[string][]string{
	"os": {
		"Chmod", "Chown", "Chtimes", "CopyFS", "Create", "CreateTemp", "Lchown", "Link", "Mkdir", "MkdirAll",
		"MkdirTemp", "Remove", "RemoveAll", "Rename", "Symlink", "Truncate", "WriteFile",
	},
	"io/ioutil": {"WriteFile", "TempFile", "TempDir"},
	"golang.org/x/sys/unix": {
		"Chmod", "Chown", "Creat", "Fallocate", "Fchmod", "Fchmodat", "Fchown", "Fchownat", "Fsconfig", "Fsmount", "Fsopen",
		"Fsetxattr", "Fsync", "Ftruncate", "Fremovexattr", "IoctlFileClone", "IoctlFileCloneRange", "IoctlFileDedupeRange",
		"Lchown", "Link", "Linkat", "Lremovexattr", "Lsetxattr", "Lutimes", "Mkdir", "Mkdirat", "Mkfifo", "Mkfifoat",
		"Mknod", "Mknodat", "Mount", "MountSetattr", "MoveMount", "OpenTree", "PivotRoot", "Removexattr", "Rename",
		"Renameat", "Renameat2", "Rmdir", "Setxattr", "Symlink", "Symlinkat", "Truncate", "Unlink", "Unlinkat", "Unmount",
		"Utime", "Utimes", "UtimesNano", "UtimesNanoAt",
	},
	"syscall": {
		"Chmod", "Chown", "Creat", "Fallocate", "Fchmod", "Fchmodat", "Fchown", "Fchownat", "Fsync", "Ftruncate", "Lchown",
		"Link", "Mkdir", "Mkdirat", "Mkfifo", "Mknod", "Mknodat", "Mount", "PivotRoot", "Removexattr", "Rename", "Renameat",
		"Rmdir", "Setxattr", "Symlink", "Truncate", "Unlink", "Unlinkat", "Unmount", "Utime", "Utimes", "UtimesNano",
	},
}

// writing are the flags that make an open a change of the disk.
var writing = []string{"O_CREATE", "O_CREAT", "O_TRUNC", "O_WRONLY", "O_RDWR", "O_APPEND", "O_EXCL", "O_TMPFILE"}

// diskCalls names the calls in a file that change the disk, each with its
// position.
func diskCalls(fset *token.FileSet, file *ast.File) []string {
	names := make(map[string]string) // name in this file -> import path
	for _, imp := range file.Imports {
		path, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			continue
		}
		name := path[strings.LastIndex(path, "/")+1:]
		if imp.Name != nil {
			name = imp.Name.Name
		}
		names[name] = path
	}
	var found []string
	report := func(n ast.Node, what string) {
		found = append(found, fmt.Sprintf("%s: %s", fset.Position(n.Pos()), what))
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && slices.Contains(changesDisk[names[x.Name]], n.Sel.Name) {
				report(n, x.Name+"."+n.Sel.Name)
			}
		case *ast.CallExpr:
			sel, ok := n.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := sel.X.(*ast.Ident)
			if !ok || !strings.HasPrefix(sel.Sel.Name, "Open") || !slices.Contains([]string{"os", "golang.org/x/sys/unix", "syscall"}, names[x.Name]) {
				return true
			}
			for _, arg := range n.Args {
				ast.Inspect(arg, func(m ast.Node) bool {
					if s, ok := m.(*ast.SelectorExpr); ok && slices.Contains(writing, s.Sel.Name) {
						report(n, x.Name+"."+sel.Sel.Name+" with "+s.Sel.Name)
					}
					return true
				})
			}
		}
		return true
	})
	return found
}

// sources calls fn for each Go file of the repository, with the folder it lies
// in, written from the repository's root.
func sources(t *testing.T, fn func(pkg, path string, fset *token.FileSet, file *ast.File)) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("the repository's root: %v", err)
	}
	count := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin" || d.Name() == "out"):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go"):
			return nil
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		count++
		fn(filepath.ToSlash(pkg), path, fset, file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if count < 10 {
		t.Fatalf("found only %d Go files under %s", count, root)
	}
}

func TestPackagesImportOnlyWhatComesBefore(t *testing.T) {
	t.Parallel()
	sources(t, func(pkg, path string, _ *token.FileSet, file *ast.File) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		if !forTests(pkg) && !slices.Contains(order, pkg) {
			t.Errorf("%s has no place in the order of packages (test/rules)", pkg)
		}
		for _, imp := range file.Imports {
			dep, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			dep, ours := strings.CutPrefix(dep, module)
			if !ours {
				continue
			}
			if err := mayImport(pkg, dep); err != nil {
				t.Errorf("%s imports %s: %v", path, dep, err)
			}
		}
	})
}

func TestOnlyDiskChangesTheDisk(t *testing.T) {
	t.Parallel()
	inDisk := 0
	sources(t, func(pkg, path string, fset *token.FileSet, file *ast.File) {
		if strings.HasSuffix(path, "_test.go") || forTests(pkg) {
			return
		}
		found := diskCalls(fset, file)
		if pkg == "internal/disk" {
			inDisk += len(found)
			return
		}
		for _, call := range found {
			t.Errorf("%s: only internal/disk changes the disk", call)
		}
	})
	if inDisk < 10 {
		t.Errorf("found only %d calls that change the disk in internal/disk: the check is blind", inDisk)
	}
}

// The plugin is what containers wait for: it starts without what only clean-up
// needs.
func TestThePluginLinksNoClientOfAnEngine(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", module+"plugin").Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := strings.Fields(string(out))
	if !slices.Contains(linked, module+"internal/volume") {
		t.Fatalf("the plugin is not what it was: %s", linked)
	}
	for _, no := range []string{"github.com/containerd/containerd/v2/client", "github.com/moby/moby/client", module + "internal/usage/sources"} {
		if slices.Contains(linked, no) {
			t.Errorf("larder-plugin links %s", no)
		}
	}
}

func TestMayImport(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		pkg, dep string
		ok       bool
	}{
		{"internal/pull", "internal/store", true},
		{"internal/store", "internal/pull", false},
		{"internal/store", "internal/store", false},
		{"internal/store", "internal/source/directory", false},
		{"internal/view", "internal/modelpack", true},
		{"internal/view", "internal/store", false},
		{"internal/volume", "internal/testenv", false},
		{"internal/pull", "internal/source/huggingface/hubtest", false},
		{"internal/testenv/loopfs", "internal/testenv", true},
		{"internal/nobody", "internal/disk", false},
		{"cmd/larder", "plugin", true},
		{"plugin", "cmd/larder", false},
	} {
		if err := mayImport(tc.pkg, tc.dep); (err == nil) != tc.ok {
			t.Errorf("mayImport(%s, %s) = %v, want ok %v", tc.pkg, tc.dep, err, tc.ok)
		}
	}
}

func TestDiskCallsAreSeen(t *testing.T) {
	t.Parallel()
	const header = "package p\nimport (\n\"os\"\nu \"golang.org/x/sys/unix\"\n)\n"
	for src, want := range map[string]int{
		`func f() { _ = os.Rename("a", "b") }`:                           1,
		`func f() { _ = u.Mount("a", "b", "c", 0, "") }`:                 1,
		`var remove = os.Remove`:                                         1,
		`func f() { _, _ = os.OpenFile("a", os.O_CREATE|os.O_EXCL, 0) }`: 2,
		`func f() { _, _ = os.OpenFile("a", os.O_RDONLY, 0) }`:           0,
		`func f() { _, _ = u.Open("a", u.O_RDWR, 0) }`:                   1,
		`func f() { _, _ = os.ReadFile("a") }`:                           0,
		`func f(os T) { _ = os.Read() }`:                                 0,
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "p.go", header+src, 0)
		if err != nil {
			t.Fatalf("%s: %v", src, err)
		}
		if got := diskCalls(fset, file); len(got) != want {
			t.Errorf("%s: found %v, want %d", src, got, want)
		}
	}
}
