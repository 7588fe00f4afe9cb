package huggingface

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// askedWait is how long an answer asks to wait before the next request, or 0.
// The hub's ratelimit header ("api";r=0;t=55: none left for 55 seconds) goes
// before Retry-After, of which, as in the hub's own client, only seconds are
// read.
func askedWait(h http.Header) time.Duration {
	if t, ok := rateLimitReset(h.Values("Ratelimit")); ok {
		return t + time.Second // its seconds are rounded down
	}
	s, err := strconv.ParseUint(strings.TrimSpace(h.Get("Retry-After")), 10, 31)
	if err != nil {
		return 0
	}
	return time.Duration(s) * time.Second
}

// rateLimitReset finds the longest t of the policies that have nothing left.
// The format is that of draft-ietf-httpapi-ratelimit-headers: a list of names
// with r, what remains, and t, the seconds until it is renewed.
func rateLimitReset(headers []string) (longest time.Duration, found bool) {
	for _, h := range headers {
		for item := range strings.SplitSeq(h, ",") {
			var remaining, seconds uint64
			var hasR, hasT bool
			for i, param := range strings.Split(item, ";") {
				if i == 0 {
					continue // the policy's name
				}
				name, value, _ := strings.Cut(strings.TrimSpace(param), "=")
				n, err := strconv.ParseUint(value, 10, 31)
				if err != nil {
					continue
				}
				switch name {
				case "r":
					remaining, hasR = n, true
				case "t":
					seconds, hasT = n, true
				}
			}
			if hasR && hasT && remaining == 0 {
				longest, found = max(longest, time.Duration(seconds)*time.Second), true
			}
		}
	}
	return longest, found
}

// contentRange is bytes FIRST-LAST/TOTAL of RFC 9110. Without a range
// (bytes */TOTAL, of a 416) first is -1; with an unknown total (*) total is -1.
type contentRange struct {
	first, last, total int64
}

func parseContentRange(h string) (contentRange, bool) {
	none := contentRange{first: -1, last: -1, total: -1}
	unit, rest, ok := strings.Cut(strings.TrimSpace(h), " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return none, false
	}
	span, total, ok := strings.Cut(strings.TrimSpace(rest), "/")
	if !ok {
		return none, false
	}
	out := none
	if total != "*" {
		if out.total, ok = parseOffset(total); !ok {
			return none, false
		}
	}
	if span == "*" {
		return out, out.total >= 0
	}
	first, last, ok := strings.Cut(span, "-")
	if !ok {
		return none, false
	}
	if out.first, ok = parseOffset(first); !ok {
		return none, false
	}
	if out.last, ok = parseOffset(last); !ok {
		return none, false
	}
	if out.last < out.first || out.total >= 0 && out.last >= out.total {
		return none, false
	}
	return out, true
}

func parseOffset(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// etag is the plain text of an entity tag: without W/ and quotes.
func etag(h string) string {
	return strings.Trim(strings.TrimPrefix(strings.TrimSpace(h), "W/"), `"`)
}

// strong gives a header that If-Range may carry, or nothing.
func strong(h string) string {
	if len(h) > 2 && h[0] == '"' && h[len(h)-1] == '"' {
		return h
	}
	return ""
}

// message is what the hub says in its own words, on one line.
func message(a *answer) string {
	body, err := io.ReadAll(io.LimitReader(a, maxErrorBytes))
	m := a.Header.Get("X-Error-Message")
	var e struct {
		Error string `json:"error"`
	}
	if m == "" && err == nil && json.Unmarshal(body, &e) == nil {
		m = e.Error
	}
	m = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, m)
	if r := []rune(strings.TrimSpace(m)); len(r) > 300 {
		return string(r[:300]) + "…"
	}
	return strings.TrimSpace(m)
}
