package main

// The user at the other end of a Unix socket: Linux.

import (
	"os"
	"syscall"
)

// peerUser returns the effective user of the process that listened on a connected Unix socket
// (SO_PEERCRED).
func peerUser(socket int) (uint32, error) {
	peer, err := syscall.GetsockoptUcred(socket, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	if err != nil {
		return 0, os.NewSyscallError("getsockopt", err)
	}
	return peer.Uid, nil
}
