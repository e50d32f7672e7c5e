//go:build !linux && !darwin && !freebsd

package main

// The user at the other end of a Unix socket: systems on which only the file of the socket
// tells.

import "errors"

// peerUser returns errors.ErrUnsupported.
func peerUser(int) (uint32, error) { return 0, errors.ErrUnsupported }
