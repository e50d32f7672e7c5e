package main

// The layout of bbolt's branch, leaf and freelist pages, as far as the file must be read
// before bbolt maps it. As a page may be broken, every offset is checked.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// The layout of a page. At these byte offsets, its header has its own page id (0), its flags
// (8), its number of elements (10) and its number of overflow pages (12). The elements follow
// the header. An element of a branch page has the position of its key (0), the size of the
// key (4) and the id of the page below (8). An element of a leaf page has its flags (0), the
// position of its key (4) and the sizes of its key (8) and of its value (12); the value
// follows the key. A position counts from the start of its element. Sizes are in bytes.
const (
	branchPageFlag   = 0x01
	leafPageFlag     = 0x02
	freelistPageFlag = 0x10
	elementSize      = 16
	// bucketLeafFlag is the flag of an element of a leaf page whose value is a bucket.
	bucketLeafFlag = 0x01
	// bucketHeaderSize is the size of the root page id and the sequence of a bucket, which
	// are the start of its value. If the bucket is inline, its root page id is 0 and its page
	// follows.
	bucketHeaderSize = 16
)

// wholePage is the size in bytes of the largest page that is read as a whole. No branch page
// reaches it: bbolt splits one that is larger than pageSize, unless it has four keys or fewer.
const wholePage = 256 << 10

// rootBucket returns the value of a bucket in the root bucket, which begins with the bucket's
// header, or nil if there is no such bucket. The root bucket is a single leaf page until its
// inline buckets outgrow that page; then it is one branch page with leaf pages below. It has
// seven keys at most, so that it needs no more levels. meta.check has accepted m.
func rootBucket(f *os.File, m meta, name []byte) ([]byte, error) {
	id := m.root
	for range 2 {
		if id >= m.pages {
			return nil, errors.New("is broken: its root page is outside the file; restore a backup")
		}
		page := make([]byte, m.pageSize)
		_, err := f.ReadAt(page, int64(id)*m.pageSize)
		overflow := uint64(binary.NativeEndian.Uint32(page[12:]))
		if size := int64(overflow+1) * m.pageSize; err == nil && overflow > 0 && size <= wholePage && id+overflow < m.pages {
			page = make([]byte, size)
			_, err = f.ReadAt(page, int64(id)*m.pageSize)
		}
		if err != nil {
			return nil, fmt.Errorf("read root page: %w", err)
		}
		child, ok := branchChild(page, name)
		if !ok {
			return leafValue(page, name, bucketLeafFlag), nil
		}
		id = child
	}
	return nil, nil
}

// branchChild returns the id of the page below a branch page in which key would be. It
// returns false if the page is not a branch page, has no elements or is cut off.
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

// leafValue returns the value of a key in a leaf page, whose element has these flags. It returns
// nil if there is none, or if the page is not a leaf page or is cut off.
func leafValue(page, key []byte, flags uint32) []byte {
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
		if bytes.Equal(page[pos:keyEnd], key) && binary.NativeEndian.Uint32(page[at:]) == flags {
			return page[keyEnd:end]
		}
	}
	return nil
}

// freeCount returns the number of ids that a freelist page says it has, and the offset at
// which they begin, in bytes. It returns false if the page is not a freelist page.
func freeCount(page []byte) (count, at uint64, ok bool) {
	if len(page) < pageHeaderSize+8 || binary.NativeEndian.Uint16(page[8:]) != freelistPageFlag {
		return 0, 0, false
	}
	count, at = uint64(binary.NativeEndian.Uint16(page[10:])), pageHeaderSize
	if count == 0xFFFF { // the number does not fit in the header and is the first entry
		return binary.NativeEndian.Uint64(page[at:]), at + 8, true
	}
	return count, at, true
}

// ErrDamaged is returned when a page of the file is broken. After that, the store still reads
// the pages that are sound, but writes nothing.
var ErrDamaged = errors.New("the database file is damaged")
