package main

import (
	"testing"
	"time"
)

func TestPercentile(t *testing.T) {
	t.Parallel()
	var hundred []time.Duration
	for i := 100; i >= 1; i-- {
		hundred = append(hundred, time.Duration(i))
	}
	for _, tc := range []struct {
		p    float64
		want time.Duration
	}{{0.5, 50}, {0.99, 99}, {1, 100}, {0.001, 1}} {
		if got := percentile(hundred, tc.p); got != tc.want {
			t.Errorf("percentile(1..100, %v) = %d, want %d", tc.p, got, tc.want)
		}
	}
	if got := percentile([]time.Duration{7}, 0.99); got != 7 {
		t.Errorf("percentile of one sample = %d", got)
	}
}

func TestMedianRatioIsOfPairs(t *testing.T) {
	t.Parallel()
	// The machine is twice as slow in the second half: the ratio stays 2.
	a := []time.Duration{20, 20, 40, 40}
	b := []time.Duration{10, 10, 20, 20}
	if got := medianRatio(a, b); got != 2 {
		t.Errorf("medianRatio = %v, want 2", got)
	}
}

// The kernel's own mount gets slower with more mounts; what Mount adds to that
// is what is judged.
func TestMoreLiveMountsAreJudgedByTheFloor(t *testing.T) {
	t.Parallel()
	times := func(ms ...time.Duration) []time.Duration {
		for i := range ms {
			ms[i] *= time.Millisecond
		}
		return ms
	}
	few := calls{live: 20, mount: times(4, 4, 4, 8), floor: times(2, 2, 2, 4)}
	for _, tc := range []struct {
		most calls
		p    float64
		want string
	}{
		{calls{live: 2000, mount: times(8, 8, 8, 8), floor: times(4, 4, 4, 4)}, 0.5,
			"Mount, from 20 live to 2000, p50: 4.00 ms to 8.00 ms, 2 ×, beside 2.00 ms to 4.00 ms, 2 × (the least a plugin must do): 1 ×, must be ≤ 1.25 ×: PASS"},
		{calls{live: 2000, mount: times(6, 6, 6, 6), floor: times(2, 2, 2, 2)}, 0.5,
			"Mount, from 20 live to 2000, p50: 4.00 ms to 6.00 ms, 1.50 ×, beside 2.00 ms to 2.00 ms, 1 × (the least a plugin must do): 1.50 ×, must be ≤ 1.25 ×: FAIL"},
		{calls{live: 2000, mount: times(4, 4, 4, 8), floor: times(2, 2, 2, 4)}, 0.99,
			"Mount, from 20 live to 2000, p99: 8.00 ms to 8.00 ms, 1 ×, beside 4.00 ms to 4.00 ms, 1 × (the least a plugin must do): 1 ×, must be ≤ 1.25 ×: PASS"},
	} {
		f := grown(few, tc.most, tc.p, 1.25)
		f.Binding = true
		if got := f.String(); got != tc.want {
			t.Errorf("%s\nwant %s", got, tc.want)
		}
	}
}

func TestBars(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		f    figure
		want string
	}{
		{figure{Binding: true}.atMost(1.01, 1, "×"), "FAIL"},
		{figure{Binding: true}.atMost(1, 1, "×"), "PASS"},
		{figure{Binding: true}.atLeast(0.96, 0.97, "×"), "FAIL"},
		{figure{Binding: true}.atLeast(0.97, 0.97, "×"), "PASS"},
		{figure{}.atLeast(0.5, 0.97, "×"), "not judged"},
	} {
		if got := tc.f.verdict(); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.f, got, tc.want)
		}
		b := &bench{figures: []figure{tc.f}}
		if err := b.verdict(); (err != nil) != (tc.want == "FAIL") {
			t.Errorf("%s: the run's verdict is %v", tc.f, err)
		}
	}
}
