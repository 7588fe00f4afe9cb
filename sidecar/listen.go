package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/service"
)

// checkListen refuses an address that can be reached from other hosts, unless
// that is allowed: the page tells anybody which models and containers are here.
func checkListen(ctx context.Context, address string, allowRemote bool) error {
	if allowRemote || strings.HasPrefix(address, "unix://") {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	refuse := func(what string) error {
		return fmt.Errorf("listen on %s: %s, and anybody who reaches it could read which models and containers are here; "+
			"listen on 127.0.0.1 or a unix:// socket, or say --allow-remote", address, what)
	}
	if host == "" {
		return refuse("it is every address of this host")
	}
	ips := []string{host}
	if _, err := netip.ParseAddr(host); err != nil {
		if ips, err = net.DefaultResolver.LookupHost(ctx, host); err != nil {
			return fmt.Errorf("listen on %s: %w", address, err)
		}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip); err != nil || !a.IsLoopback() {
			return refuse(ip + " is not a loopback address")
		}
	}
	return nil
}

// listen makes the socket. One of the file system is root's alone, unless all
// are allowed.
func listen(address string, allowRemote bool) (net.Listener, error) {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return l, nil
	}
	if allowRemote {
		return service.ListenUnix(path, 0o666, "--listen")
	}
	return service.ListenUnix(path, 0o600, "--listen")
}

// hosts are the names by which the server may be asked; nil: any. A page of
// the web whose name is made to mean 127.0.0.1 must not read what is here.
func hosts(cfg config.Config, l net.Listener) map[string]bool {
	if cfg.AllowRemote || l.Addr().Network() == "unix" {
		return nil
	}
	out := map[string]bool{"localhost": true, "127.0.0.1": true, "::1": true}
	if host, _, err := net.SplitHostPort(cfg.Listen); err == nil {
		out[host] = true
	}
	return out
}
