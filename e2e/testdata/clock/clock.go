package main

// A clock that jumps, which clock_test.go builds into the program: the wall clock of
// one process cannot be set, and Go's time does not go through libc.

import (
	"fmt"
	"os"
	"time"
	"unsafe"
)

// movedClockEnv names the file that says how far the clock is ahead, as a duration in
// whole seconds.
const movedClockEnv = "MOVED_CLOCK"

// movedClock is time.Now on a machine whose wall clock was set.
func movedClock() time.Time {
	text, err := os.ReadFile(os.Getenv(movedClockEnv))
	if err != nil {
		panic(err)
	}
	by, err := time.ParseDuration(string(text))
	if err != nil {
		panic(err)
	}
	return withWallMoved(time.Now(), by)
}

// withWallMoved moves what a time says and leaves its monotonic reading, as
// Time.Add does not. The first word of a Time with a monotonic reading has the seconds
// since 1885 in 33 bits, above the 30 of the nanoseconds.
func withWallMoved(t time.Time, by time.Duration) time.Time {
	*(*uint64)(unsafe.Pointer(&t)) += uint64(by/time.Second) << 30
	return t
}

func init() {
	now := time.Now()
	for _, by := range []time.Duration{time.Hour, -time.Hour} {
		moved := withWallMoved(now, by)
		if wall, monotonic := moved.Round(0).Sub(now.Round(0)), moved.Sub(now); wall != by || monotonic != 0 {
			panic(fmt.Sprintf("a clock moved by %v is moved by %v, its monotonic reading by %v", by, wall, monotonic))
		}
	}
}
