package hubtest

import (
	"encoding/json"
	"net/http"
)

// control answers for another process what Requests, Inject and ClearFaults
// do in this one. It tells whether the request was for it.
func (h *Hub) control(w http.ResponseWriter, r *http.Request) bool {
	switch r.Method + " " + r.URL.Path {
	case "GET /_test/requests":
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(h.Requests())
	case "POST /_test/fault":
		var f Fault
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&f); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return true
		}
		h.Inject(f)
	case "DELETE /_test/fault":
		h.ClearFaults()
	default:
		return false
	}
	return true
}
