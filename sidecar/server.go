package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// server answers over HTTP. It only shows.
type server struct{ http.Server }

// newServer makes a server that may be asked by the given names; nil: by any.
func newServer(n *node, m *metrics, hosts map[string]bool, log *slog.Logger) (*server, error) {
	if err := m.watch(n); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError)}))
	mux.HandleFunc("/healthz", n.serveHealth)
	mux.HandleFunc("/readyz", n.serveReady)
	mux.HandleFunc("/{$}", n.servePage)
	return &server{http.Server{
		Handler:           guard(mux, hosts),
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       5 * time.Second,
		MaxHeaderBytes:    32 << 10,
	}}, nil
}

// maxConnections are open at once. More wait: they would use up the file
// descriptors that looking and cleaning up need.
const maxConnections = 64

// Serve answers until the server is stopped.
func (s *server) Serve(l net.Listener) error {
	return s.Server.Serve(netutil.LimitListener(l, maxConnections))
}

// stop lets answers that are under way be finished, for a moment.
func (s *server) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if s.Shutdown(ctx) != nil {
		_ = s.Close()
	}
}

// guard lets pass what only reads, and asks by a name that is ours.
func guard(next http.Handler, hosts map[string]bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD: nothing is changed here", http.StatusMethodNotAllowed)
			return
		}
		if hosts != nil && !hosts[hostOf(r.Host)] {
			http.Error(w, "this server is asked by its own address only", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func hostOf(hostport string) string {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	if n := len(host); n > 1 && host[0] == '[' && host[n-1] == ']' {
		host = host[1 : n-1]
	}
	return host
}

// serveHealth tells whether the process works.
func (n *node) serveHealth(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if why := n.loop.Stuck(); why != "" {
		http.Error(w, why, http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ok\n"))
}

// serveReady tells whether clean-up works, and if not, why.
func (n *node) serveReady(w http.ResponseWriter, _ *http.Request) {
	checks, ok := n.ready(time.Now())
	w.Header().Set("Content-Type", "application/json")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	_ = out.Encode(struct {
		Ready  bool    `json:"ready"`
		Checks []check `json:"checks"`
	}{ok, checks})
}
