package progress

import "time"

// tally counts bytes and knows how fast they come: of one file, or of all.
type tally struct {
	bytes   int64 // done now, what was had included
	had     int64 // of bytes, those that took no time: from an earlier attempt, or another process's
	samples []sample
}

type sample struct {
	at    time.Time
	bytes int64 // without what was had
}

func newTally(now time.Time) tally { return tally{samples: []sample{{at: now}}} }

// window is how far back the rate looks: long enough to be calm, short enough
// to be true.
const window = 10 * time.Second

func (t *tally) add(now time.Time, n int64) {
	t.bytes += n
	last := t.samples[len(t.samples)-1]
	if len(t.samples) > 1 && now.Sub(last.at) < window/20 {
		return
	}
	t.samples = append(t.samples, sample{now, t.bytes - t.had})
	for len(t.samples) > 2 && now.Sub(t.samples[1].at) > window {
		t.samples = t.samples[1:]
	}
}

func (t *tally) have(n int64) {
	t.bytes += n
	t.had += n
}

// rate is bytes a second lately; 0 where nothing can be said.
func (t *tally) rate(now time.Time) float64 {
	for i, s := range t.samples {
		if age := now.Sub(s.at); age <= window || i == len(t.samples)-1 {
			if age < 100*time.Millisecond {
				return 0
			}
			return max(0, float64(t.bytes-t.had-s.bytes)/age.Seconds())
		}
	}
	return 0
}

// left is how long todo bytes take at a rate; negative where nothing can be
// said.
func left(todo int64, rate float64) time.Duration {
	if rate <= 0 || todo < 0 {
		return -1
	}
	return time.Duration(float64(todo) / rate * float64(time.Second))
}

// pace writes how fast todo bytes go down: ", 10 MiB/s, 15 s left". It is empty
// where nothing can be said.
func pace(todo int64, rate float64) string {
	if rate <= 0 {
		return ""
	}
	s := ", " + Bytes(int64(rate)) + "/s"
	if d := left(todo, rate); d >= 0 {
		s += ", " + Duration(d) + " left"
	}
	return s
}
