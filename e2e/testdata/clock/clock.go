package main

// clock_test.go builds this file into the program to simulate a wall clock that jumps. The wall
// clock of a single process cannot be set, and Go's package time does not use libc, so that
// tools such as faketime have no effect.

import (
	"fmt"
	"os"
	"time"
	"unsafe"
)

// movedClockEnv is the environment variable with the path of a file. The file has the duration by
// which the clock is ahead, in whole seconds and in the syntax of time.ParseDuration.
const movedClockEnv = "MOVED_CLOCK"

// movedClock returns the time as time.Now would on a machine whose wall clock was set.
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

// withWallMoved returns t with its wall clock moved and its monotonic reading unchanged, whereas
// Time.Add moves both. The first word of a Time with a monotonic reading has the seconds since
// 1885 in 33 bits, above 30 bits of nanoseconds.
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
