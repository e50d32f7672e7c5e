package main

// The TLS certificate (--tls-cert, --tls-key), which is loaded again when its files change.

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// certificate is a TLS certificate and its private key, loaded from two PEM files. Each
// handshake checks whether the files have changed, so that a renewed certificate is used
// without a restart. The check is two stat calls, far less work than the handshake.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex
	pair   *tls.Certificate // the last one that could be used
	states [2]fileState     // of certFile and keyFile when they were last read
}

// fileState is compared to detect that a file has changed, whether it was written in place
// or replaced by another file.
type fileState struct {
	modified time.Time
	size     int64 // in bytes
	inode    uint64
	err      string // why the file has no state, such as that it does not exist; or ""
}

// stateOf returns the current state of a file.
func stateOf(name string) fileState {
	info, err := os.Stat(name)
	if err != nil {
		return fileState{err: err.Error()}
	}
	state := fileState{modified: info.ModTime(), size: info.Size()}
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		state.inode = s.Ino
	}
	return state
}

// newCertificate loads a certificate. It returns an error if the files cannot be read or are
// not a certificate and its key.
func newCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	if _, err := c.update(); err != nil {
		return nil, fmt.Errorf("--tls-cert and --tls-key: %w; name a certificate and its key, in PEM files that this account may read", err)
	}
	return c, nil
}

// config returns the TLS configuration of a server for HTTP/2 and HTTP/1.1 that uses the
// certificate.
func (c *certificate) config() *tls.Config {
	return &tls.Config{NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get}
}

// get returns the certificate for a handshake. It loads the files first if they have
// changed. If they cannot be used, it logs that and returns the previous certificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed, err := c.update()
	switch {
	case err != nil: // which is temporary if only one of the two files has been replaced so far
		c.log.Warn("the TLS certificate or its key changed and cannot be used; the server keeps using the previous certificate; fix the files, no restart is needed", "err", err)
	case changed:
		c.log.Info("the TLS certificate changed", "expires", c.pair.Leaf.NotAfter)
	}
	return c.pair, nil
}

// update loads the files if they have changed since they were last read, and reports
// whether it loaded a certificate. Files that could not be used are not read again until
// they change, so that get logs them once, not for each handshake. The caller must hold
// mu, except in newCertificate.
func (c *certificate) update() (changed bool, err error) {
	now := [2]fileState{stateOf(c.certFile), stateOf(c.keyFile)}
	if now == c.states {
		return false, nil
	}
	c.states = now
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return false, err
	}
	c.pair = &pair
	return true, nil
}
