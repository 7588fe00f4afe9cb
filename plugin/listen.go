package main

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/larder-project/larder/internal/service"
)

// listen takes the socket that systemd hands over, else makes its own.
func listen(path string) (net.Listener, error) {
	handed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take the socket from systemd: %w", err)
	}
	for _, l := range handed {
		if l != nil {
			return l, nil
		}
	}
	// Nobody but root may speak to the driver: who can mount any model with
	// any owner is root on the volumes of all containers.
	return service.ListenUnix(path, 0o600, "--socket")
}
