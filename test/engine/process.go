package engine

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// processes lists the pids whose command line, arguments joined by blanks,
// is wanted. Zombies have none.
func processes(want func(cmdline string) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil || len(data) == 0 {
			continue
		}
		if want(string(bytes.ReplaceAll(data, []byte{0}, []byte{' '}))) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// descendants lists the children of pid, their children, and so on.
func descendants(pid int) []int {
	var all []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range tasks {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, word := range strings.Fields(string(data)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				continue
			}
			all = append(all, child)
			all = append(all, descendants(child)...)
		}
	}
	return all
}

// alive tells whether pid is a process that runs; a zombie does not.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// "PID (name, may hold anything) STATE ..."
	rest := string(data[bytes.LastIndexByte(data, ')')+1:])
	state := strings.TrimSpace(rest)
	return state != "" && state[0] != 'Z' && state[0] != 'X'
}

func waitGone(pid int, limit time.Duration) error {
	if pid == 0 {
		return nil
	}
	for deadline := time.Now().Add(limit); alive(pid); {
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d still runs after %s", pid, limit)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}
