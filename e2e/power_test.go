//go:build linux

package e2e

// This test simulates a power cut: a file system in an image file loses all unsynced data.

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

func TestAcknowledgedWritesSurviveAPowerCut(t *testing.T) {
	long(t)
	needTool(t, "xfs_io")
	t.Parallel()
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			needTool(t, "mkfs."+kind)
			t.Parallel()
			d := newPowered(t, kind)
			survives(t, filepath.Join(d.dir, "c.db"), servicetest.Amount(5, 200), d.cutPower)
			t.Logf("%d of %d power cuts lost a file that was not synced", d.lost, d.cuts)
			if d.lost == 0 {
				t.Error("no power cut lost unsynced data, so the test proves nothing")
			}
		})
	}
}

// powered is a file system in an image file whose power can be cut.
type powered struct {
	kind, image, dir string
	cuts             int
	lost             int // number of cuts that lost an unsynced file or its content
}

// newPowered creates and mounts a file system of a type that mount(8) and mkfs(8) support.
func newPowered(t testing.TB, kind string) *powered {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the power cut needs a file system in an image file, which only root may mount; run the tests as root")
	}
	image := filepath.Join(t.TempDir(), "image")
	writeTo(t, image, nil)
	if err := os.Truncate(image, 320<<20); err != nil { // XFS needs at least 300 MB
		t.Fatal(err)
	}
	succeeds(t, exec.Command("mkfs."+kind, "-q", image))
	d := &powered{kind: kind, image: image, dir: filepath.Dir(shortPath(t))}
	if out, err := d.mount(); err != nil {
		t.Skipf("the power cut needs a file system in an image file, and this root may not mount one (a container without CAP_SYS_ADMIN or loop devices?): %v\n%s", err, out)
	}
	t.Cleanup(func() {
		// MNT_DETACH unmounts even if the process still has its file open. EINVAL means that
		// nothing is mounted.
		if err := syscall.Unmount(d.dir, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
	})
	return d
}

// mount mounts the file system and returns the output of mount(8).
func (d *powered) mount() ([]byte, error) {
	return exec.Command("mount", "-t", d.kind, "-o", "loop", d.image, d.dir).CombinedOutput()
}

// cutPower makes the file system lose its unsynced data and refuse all operations, kills the
// process up to 50 ms later, and mounts the file system again.
func (d *powered) cutPower(t testing.TB, kill func()) {
	t.Helper()
	unsynced := filepath.Join(d.dir, fmt.Sprint("unsynced-", d.cuts))
	writeTo(t, unsynced, []byte("not synced"))
	succeeds(t, exec.Command("xfs_io", "-x", "-c", "shutdown", d.dir))
	time.Sleep(rand.N(50 * time.Millisecond)) // writes are refused or left in doubt
	kill()
	waitUntil(t, answerTimeout, d.dir+" is unmounted", func() error { return syscall.Unmount(d.dir, 0) })
	if out, err := d.mount(); err != nil {
		t.Fatalf("mount %s after the power cut: %v\n%s", d.image, err, out)
	}
	d.cuts++
	if content, err := os.ReadFile(unsynced); err != nil || len(content) == 0 {
		d.lost++
	}
}
