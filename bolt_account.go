package main

// The account of pages: each page of a database file is used exactly once or free. It also
// reads pages, with bounded memory whatever they say of their size.

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
)

// pageAccount reads pages and keeps account of their use. As no page is read twice, a search
// ends even where pages form a cycle.
type pageAccount struct {
	f        *os.File
	pageSize int64  // in bytes
	pages    uint64 // number of pages of the file, at most maxPages
	// seen has the bit of a page, by its id, if the page is in use or in the list of free pages.
	seen []uint64
	page []byte // the beginning of the page that was read last, see readPage
	part []byte // the part of a page that was read last, see read
	// report is called with each fault, a text for the operator.
	report func(fault string)
	// progress is called with the number of bytes checked since the last call. Its error
	// ends the check.
	progress func(bytes int64) error
}

// readAhead is how many bytes of the list of free pages are read at once.
const readAhead = 64 << 10

// newPageAccount returns the account of a file, in which the meta pages are used.
func newPageAccount(f *os.File, pageSize int64, pages uint64, report func(string), progress func(bytes int64) error) pageAccount {
	seen := make([]uint64, pages/64+1)
	seen[0] = 0b11
	return pageAccount{f: f, pageSize: pageSize, pages: pages, seen: seen, report: report, progress: progress}
}

// checkFreelist checks the page that lists the ids of the free pages, up to the first fault.
func (a *pageAccount) checkFreelist(id uint64) error {
	size, ok, err := a.readPage(id)
	if !ok || err != nil {
		return err
	}
	count, offset, ok := freeCount(a.page)
	if !ok {
		a.report(fmt.Sprintf("page %d should hold the list of free pages, but does not", id))
		return nil
	}
	at := int64(offset)
	if count > uint64(size-at)/8 {
		a.report(fmt.Sprintf("the list of free pages has %d entries, more than fit in its page", count))
		return nil
	}
	for end := at + 8*int64(count); at < end; at += readAhead {
		ids, err := a.read(id, at, min(readAhead, end-at))
		if err != nil {
			return err
		}
		for i := 0; i < len(ids); i += 8 {
			if !a.markUse(binary.NativeEndian.Uint64(ids[i:]), "is listed as free, and is in use or listed again") {
				return nil
			}
		}
		if err := a.progress(int64(len(ids)/8) * a.pageSize); err != nil {
			return err
		}
	}
	return nil
}

// readPage reads the beginning of a page into a.page, and marks it and its overflow pages as
// used. It returns the size of all of them in bytes, or false if the page is broken, which it
// reports, or is in use already. A page of at most wholePage is read as a whole.
func (a *pageAccount) readPage(id uint64) (size int64, ok bool, err error) {
	if !a.markUse(id, usedTwice) {
		return 0, false, nil
	}
	if a.page, err = a.readInto(a.page, id, 0, a.pageSize); err != nil {
		return 0, false, err
	}
	overflow := uint64(binary.NativeEndian.Uint32(a.page[12:]))
	switch headerID := binary.NativeEndian.Uint64(a.page); {
	case headerID != id:
		a.report(fmt.Sprintf("page %d has the id %d in its header", id, headerID))
		return 0, false, nil
	case id+overflow >= a.pages:
		a.report(fmt.Sprintf("page %d overflows by %d pages, beyond the end of the file", id, overflow))
		return 0, false, nil
	}
	for i := range overflow {
		if !a.markUse(id+1+i, usedTwice) {
			return 0, false, nil
		}
	}
	size = int64(overflow+1) * a.pageSize
	if overflow > 0 && size <= wholePage {
		a.page, err = a.readInto(a.page, id, 0, size)
	}
	if err != nil {
		return 0, false, err
	}
	return size, true, a.progress(size)
}

// read reads a part of a page, at an offset in it. The part is valid until the next call.
func (a *pageAccount) read(id uint64, at, size int64) (part []byte, err error) {
	a.part, err = a.readInto(a.part, id, at, size)
	return a.part, err
}

// readInto is like read, but reads into buf, which it replaces if it is too small.
func (a *pageAccount) readInto(buf []byte, id uint64, at, size int64) ([]byte, error) {
	if int64(cap(buf)) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	if _, err := a.f.ReadAt(buf, int64(id)*a.pageSize+at); err != nil {
		return buf, fmt.Errorf("read page %d: %w", id, err)
	}
	return buf, nil
}

// usedTwice is the fault of a page that a tree leads to and that is marked already.
const usedTwice = "is used twice, or is in use and listed as free"

// markUse records the use of a page. It reports a fault and returns false if the id is not
// that of a data page of the file, or, with the text again, if it was marked before.
func (a *pageAccount) markUse(id uint64, again string) bool {
	if id < 2 || id >= a.pages {
		a.report(fmt.Sprintf("a reference leads to page %d; the pages of this file are 2 to %d", id, a.pages-1))
		return false
	}
	word, bit := &a.seen[id/64], uint64(1)<<(id%64)
	if *word&bit != 0 {
		a.report(fmt.Sprintf("page %d %s", id, again))
		return false
	}
	*word |= bit
	return true
}

// next returns the first page from id on that is seen or not, or the number of pages if there is
// none.
func (a *pageAccount) next(id uint64, seen bool) uint64 {
	for ; id < a.pages; id = id | 63 + 1 {
		word := a.seen[id/64]
		if !seen {
			word = ^word
		}
		if word >>= id % 64; word != 0 {
			return min(id+uint64(bits.TrailingZeros64(word)), a.pages)
		}
	}
	return a.pages
}
