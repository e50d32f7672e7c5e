//go:build darwin || freebsd

package main

// The user at the other end of a Unix socket: macOS and FreeBSD.

import (
	"os"

	"golang.org/x/sys/unix"
)

// peerUser returns the effective user of the process that listened on a connected Unix socket
// (LOCAL_PEERCRED).
func peerUser(socket int) (uint32, error) {
	peer, err := unix.GetsockoptXucred(socket, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return 0, os.NewSyscallError("getsockopt", err)
	}
	return peer.Uid, nil
}
