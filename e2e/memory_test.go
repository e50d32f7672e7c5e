package e2e

// The memory that commands need to copy more data than they may hold.

import (
	"crypto/sha256"
	"energy-contracts/internal/servicetest"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"testing"
)

var heapLine = regexp.MustCompile(`gc \d+ .* (\d+)->(\d+)->\d+ MB`)

// heap returns the largest heap, in MB, of a process that ran with GODEBUG=gctrace=1, or 0 if
// the heap never reached the size of the first collection.
func heap(stderr string) (most int) {
	for _, m := range heapLine.FindAllStringSubmatch(stderr, -1) {
		for _, n := range m[1:] {
			mb, _ := strconv.Atoi(n)
			most = max(most, mb)
		}
	}
	return most
}

func TestExportAndImportTakeNoMoreMemoryForMore(t *testing.T) {
	long(t)
	t.Parallel()
	const limit = 40 // MB
	file := servicetest.ManyLines(t, 60_000, 1500)
	if info, err := os.Stat(file); err != nil || info.Size() < 2*limit<<20 {
		t.Fatalf("%v, %v: too small to tell", info, err)
	}
	traced := []string{"env", "GODEBUG=gctrace=1"}
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("server %v", up), func(t *testing.T) {
			db := shortPath(t)
			var p *process
			if up {
				p = startProcess(t, traced, "--db", db)
			}
			for _, args := range [][]string{{"import", file}, {"export", file + ".out"}, {"backup", file + ".db"}} {
				got := run(t, traced, append(args, "--db", db)...)
				if got.status != 0 {
					t.Fatalf("%q: %+v", args, got)
				}
				if mb := heap(got.stderr); mb > limit {
					t.Errorf("%q took %d MB", args, mb)
				}
			}
			if up {
				if mb := heap(p.Stderr.String()); mb > limit || mb <= 0 {
					t.Errorf("the server took %d MB", mb)
				}
			}
			wantSame(t, file+".out", file)
		})
	}
}

// A line longer than a contract can be is not held in memory.
func TestImportOfLongLinesTakesBoundedMemory(t *testing.T) {
	long(t)
	t.Parallel()
	endless := writeFile(t, []byte("xx"))
	if err := os.Truncate(endless, 400<<20); err != nil {
		t.Fatal(err)
	}
	traced := []string{"env", "GODEBUG=gctrace=1"}
	for _, tt := range []struct {
		name, file string
		stdout     string
		limit      int // MB
	}{
		{"as long as can be", servicetest.ManyLines(t, 12, 4<<20), "imported 12 contracts\n", 200},
		{"longer", endless, "line 1: # must be at most 5246976 bytes; import a longer line while a server with a larger --max-body runs\n", 40},
	} {
		for _, up := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, server %v", tt.name, up), func(t *testing.T) {
				db := shortPath(t)
				var p *process
				if up {
					p = startProcess(t, traced, "--db", db)
				}
				got := run(t, traced, "import", tt.file, "--db", db)
				if got.stdout != tt.stdout {
					t.Errorf("%+v", got)
				}
				if mb := heap(got.stderr); mb > tt.limit {
					t.Errorf("the command took %d MB", mb)
				}
				if up {
					if mb := heap(p.Stderr.String()); mb > tt.limit || mb <= 0 {
						t.Errorf("the server took %d MB", mb)
					}
				}
			})
		}
	}
}

// wantSame compares two files without holding them in memory.
func wantSame(t testing.TB, path, want string) {
	t.Helper()
	var sums [2]string
	for i, path := range []string{path, want} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = fmt.Sprintf("%d bytes with the sum %x", n, h.Sum(nil))
	}
	if sums[0] != sums[1] {
		t.Errorf("%s has %s\n%s has %s", path, sums[0], want, sums[1])
	}
}
