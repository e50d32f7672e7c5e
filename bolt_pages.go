package main

// The layout of bbolt's branch, leaf and freelist pages, as far as values must be read
// before bbolt may map the file.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// The layout of a page: its header has its flags at 8, its count of elements at
// 10. An element has the position of its key, from its own start, at 0 (branch)
// or 4 (leaf).
const (
	branchPageFlag = 0x01
	leafPageFlag   = 0x02
	elementSize    = 16
	// bucketHeaderSize is that of a bucket's root id and sequence, before its page
	// if that stands inline.
	bucketHeaderSize = 16
)

// rootLeaf returns the page of the root bucket where key is, if it is anywhere.
// The root is one leaf until the small buckets that stand inline in it outgrow a
// page; then there is a branch above. It has seven keys at most, so one level.
func rootLeaf(f *os.File, m meta, key []byte) ([]byte, error) {
	page := make([]byte, m.pageSize)
	id := m.root
	for range 2 {
		if id >= m.pages {
			return nil, errors.New("is broken: its root is outside of it; restore a backup")
		}
		if _, err := f.ReadAt(page, int64(id)*m.pageSize); err != nil {
			return nil, fmt.Errorf("read root page: %w", err)
		}
		child, ok := branchChild(page, key)
		if !ok {
			break
		}
		id = child
	}
	return page, nil
}

// branchChild returns the id of the page below a branch page where key is, or
// false where the page is no branch, or ends too early.
func branchChild(page, key []byte) (child uint64, ok bool) {
	if binary.NativeEndian.Uint16(page[8:]) != branchPageFlag {
		return 0, false
	}
	count := int(binary.NativeEndian.Uint16(page[10:]))
	for i := range count {
		at := pageHeaderSize + i*elementSize
		if at+elementSize > len(page) {
			return 0, false
		}
		pos := uint64(binary.NativeEndian.Uint32(page[at:])) + uint64(at)
		end := pos + uint64(binary.NativeEndian.Uint32(page[at+4:]))
		if end > uint64(len(page)) {
			return 0, false
		}
		if i > 0 && bytes.Compare(page[pos:end], key) > 0 {
			break
		}
		child, ok = binary.NativeEndian.Uint64(page[at+8:]), true
	}
	return child, ok
}

// leafValue finds a key in a leaf page and returns its value, or nil where the
// page is none or ends too early.
func leafValue(page, key []byte) []byte {
	if len(page) < pageHeaderSize || binary.NativeEndian.Uint16(page[8:]) != leafPageFlag {
		return nil
	}
	count := int(binary.NativeEndian.Uint16(page[10:]))
	for i := range count {
		at := pageHeaderSize + i*elementSize
		if at+elementSize > len(page) {
			return nil
		}
		pos := uint64(binary.NativeEndian.Uint32(page[at+4:])) + uint64(at)
		keyEnd := pos + uint64(binary.NativeEndian.Uint32(page[at+8:]))
		end := keyEnd + uint64(binary.NativeEndian.Uint32(page[at+12:]))
		if end > uint64(len(page)) {
			return nil
		}
		if bytes.Equal(page[pos:keyEnd], key) {
			return page[keyEnd:end]
		}
	}
	return nil
}

const (
	freelistPageFlag = 0x10
	bucketLeafFlag   = 0x01
)

// freeCount returns how many ids the page of free pages says that it has, and where
// they begin, or false where it is none.
func freeCount(page []byte) (count, at uint64, ok bool) {
	if len(page) < pageHeaderSize+8 || binary.NativeEndian.Uint16(page[8:]) != freelistPageFlag {
		return 0, 0, false
	}
	count, at = uint64(binary.NativeEndian.Uint16(page[10:])), pageHeaderSize
	if count == 0xFFFF { // then the first entry is the count
		return binary.NativeEndian.Uint64(page[at:]), at + 8, true
	}
	return count, at, true
}

// What the store's methods return, wrapped, where a caller must branch.
// ErrDamaged: a page of the file is broken. The store goes on reading what
// it can and writes no more.
var ErrDamaged = errors.New("the database file is damaged")
