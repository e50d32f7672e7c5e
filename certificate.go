package main

// The TLS certificate of --tls-cert and --tls-key, loaded again when the files change.

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// certificate is what the two files say. Each handshake looks whether they changed,
// which costs next to nothing beside it.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu   sync.Mutex
	pair *tls.Certificate
	read [2]fileState // of the files when they were read last
}

// fileState differs when the file does, however it was replaced.
type fileState struct {
	modified time.Time
	size     int64
	inode    uint64
	err      string
}

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

// newCertificate returns an error if the files are not a certificate and its key.
func newCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	if _, err := c.update(); err != nil {
		return nil, fmt.Errorf("--tls-cert and --tls-key: %w", err)
	}
	return c, nil
}

// config is for a server of HTTP/2 and HTTP/1.1.
func (c *certificate) config() *tls.Config {
	return &tls.Config{NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get}
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed, err := c.update()
	switch {
	case err != nil: // also between the writing of one file and of the other
		c.log.Warn("the TLS certificate or its key changed and cannot be used; the one from before is, until the files are right", "err", err)
	case changed:
		c.log.Info("the TLS certificate changed", "expires", c.pair.Leaf.NotAfter)
	}
	return c.pair, nil
}

// update reads the files unless it has read them as they are, right or wrong.
func (c *certificate) update() (changed bool, err error) {
	now := [2]fileState{stateOf(c.certFile), stateOf(c.keyFile)}
	if now == c.read {
		return false, nil
	}
	c.read = now
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return false, err
	}
	c.pair = &pair
	return true, nil
}
