package main

// Every page of a database file, looked at as bytes: that none lies outside of the
// file, stands twice, or has elements outside of itself. bbolt's own check takes
// that for granted, and ends the process where it is not so.

import (
	"encoding/binary"
	"fmt"
	"os"
)

const (
	freelistPageFlag = 0x10
	bucketLeafFlag   = 0x01
	// maxTreeDepth is more than any tree has: a branch has at least two pages below.
	maxTreeDepth = 64
)

// survey is one look at all the pages that a meta page leads to.
type survey struct {
	f     *os.File
	m     meta
	used  []bool // by page id
	found func(string)
	seen  func(bytes int64) error
}

// surveyPages tells found what is wrong, and seen how much more was looked at. It
// returns an error when the file cannot be read, and seen's.
func surveyPages(f *os.File, m meta, found func(string), seen func(bytes int64) error) error {
	s := &survey{f: f, m: m, used: make([]bool, m.pages), found: found, seen: seen}
	s.used[0], s.used[1] = true, true // the meta pages
	if err := s.freelist(); err != nil {
		return err
	}
	return s.tree(m.root, 1)
}

// read returns a page and those that it overflows to, or nil where something is
// wrong with it.
func (s *survey) read(id uint64) ([]byte, error) {
	if id < 2 || id >= s.m.pages {
		s.found(fmt.Sprintf("page %d is outside of the file, which has %d", id, s.m.pages))
		return nil, nil
	}
	page := make([]byte, s.m.pageSize)
	if _, err := s.f.ReadAt(page, int64(id)*s.m.pageSize); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.NativeEndian.Uint32(page[12:]))
	switch is := binary.NativeEndian.Uint64(page); {
	case is != id:
		s.found(fmt.Sprintf("page %d says that it is page %d", id, is))
		return nil, nil
	case id+overflow >= s.m.pages:
		s.found(fmt.Sprintf("page %d goes on for %d pages, out of the file", id, overflow))
		return nil, nil
	}
	for i := id; i <= id+overflow; i++ {
		if s.used[i] {
			s.found(fmt.Sprintf("page %d is used twice", i))
			return nil, nil
		}
		s.used[i] = true
	}
	if overflow > 0 {
		page = make([]byte, int64(overflow+1)*s.m.pageSize)
		if _, err := s.f.ReadAt(page, int64(id)*s.m.pageSize); err != nil {
			return nil, fmt.Errorf("read page %d: %w", id, err)
		}
	}
	return page, s.seen(int64(len(page)))
}

// freelist looks at the page with the ids of the free ones.
func (s *survey) freelist() error {
	page, err := s.read(s.m.freelist)
	if page == nil || err != nil {
		return err
	}
	count, at, ok := freeCount(page)
	if !ok {
		s.found(fmt.Sprintf("page %d is not the list of free pages", s.m.freelist))
		return nil
	}
	if count > (uint64(len(page))-at)/8 {
		s.found(fmt.Sprintf("the list of free pages has %d entries, more than fit", count))
		return nil
	}
	for i := range count {
		if id := binary.NativeEndian.Uint64(page[at+8*i:]); id < 2 || id >= s.m.pages {
			s.found(fmt.Sprintf("page %d is free and outside of the file, which has %d", id, s.m.pages))
		}
	}
	return s.seen(int64(count) * s.m.pageSize)
}

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

// tree looks at a page and all below it.
func (s *survey) tree(id uint64, depth int) error {
	if depth > maxTreeDepth {
		s.found(fmt.Sprintf("page %d is deeper than a database can be", id))
		return nil
	}
	page, err := s.read(id)
	if page == nil || err != nil {
		return err
	}
	where := fmt.Sprintf("page %d", id)
	switch binary.NativeEndian.Uint16(page[8:]) {
	case branchPageFlag:
		for _, child := range s.branch(where, page) {
			if err := s.tree(child, depth+1); err != nil {
				return err
			}
		}
	case leafPageFlag:
		if binary.NativeEndian.Uint16(page[10:]) == 0 { // an empty bucket is inside of its parent
			s.found(where + " is a leaf with nothing in it")
		}
		for _, root := range s.leaf(where, page) {
			if err := s.tree(root, depth+1); err != nil {
				return err
			}
		}
	default:
		s.found(where + " is neither a branch nor a leaf")
	}
	return nil
}

// branch returns the ids of the pages below.
func (s *survey) branch(where string, page []byte) (children []uint64) {
	elements := s.elements(where, page, 0, 4, 0)
	if len(elements) == 0 {
		s.found(where + " is a branch with nothing below")
	}
	for _, e := range elements {
		children = append(children, binary.NativeEndian.Uint64(page[e.at+8:]))
	}
	return children
}

// leaf returns the ids of the root pages of the buckets in it.
func (s *survey) leaf(where string, page []byte) (roots []uint64) {
	for i, e := range s.elements(where, page, 4, 8, 12) {
		switch binary.NativeEndian.Uint32(page[e.at:]) {
		case 0:
			continue
		case bucketLeafFlag:
		default:
			s.found(fmt.Sprintf("%s has an element %d of no kind", where, i))
			continue
		}
		bucket := page[e.value:e.end]
		switch {
		case len(bucket) < bucketHeaderSize:
			s.found(fmt.Sprintf("%s has a bucket of %d bytes as its element %d", where, len(bucket), i))
		case binary.NativeEndian.Uint64(bucket) != 0:
			roots = append(roots, binary.NativeEndian.Uint64(bucket))
		default:
			inline := bucket[bucketHeaderSize:]
			where := fmt.Sprintf("%s, element %d", where, i)
			switch {
			case len(inline) < pageHeaderSize || binary.NativeEndian.Uint16(inline[8:]) != leafPageFlag:
				s.found(where + " is a bucket without a leaf")
			case binary.NativeEndian.Uint16(inline[10:]) == 0 && len(inline) > pageHeaderSize:
				s.found(where + " is an empty bucket with something in it")
			case len(s.leaf(where, inline)) > 0:
				s.found(where + " is a bucket inside of its page, with a bucket in it")
			}
		}
	}
	return roots
}

// element is where an element of a page is, its value, and the end of that.
type element struct{ at, value, end int }

// elements returns where the elements of a page are, or nothing where one is not where
// bbolt puts it: their keys and values follow one another behind all of them. The
// position of a key, its size and the size of the value are at these offsets of an
// element; 0 is no value.
func (s *survey) elements(where string, page []byte, pos, keySize, valueSize int) (all []element) {
	count := int(binary.NativeEndian.Uint16(page[10:]))
	next := pageHeaderSize + count*elementSize
	u32 := func(at int) int64 { return int64(binary.NativeEndian.Uint32(page[at:])) }
	for i := range count {
		at := pageHeaderSize + i*elementSize
		if next > len(page) || int64(at)+u32(at+pos) != int64(next) {
			s.found(fmt.Sprintf("%s has its element %d not where it belongs", where, i))
			return nil
		}
		value := int64(next) + u32(at+keySize)
		end := value
		if valueSize > 0 {
			end += u32(at + valueSize)
		}
		if end > int64(len(page)) {
			s.found(fmt.Sprintf("%s has its element %d end outside of itself", where, i))
			return nil
		}
		next = int(end)
		all = append(all, element{at, int(value), next})
	}
	return all
}
