package main

// The page checker: it reads the pages of a database file without bbolt and verifies that
// each page is used exactly once, that the elements of a page lie inside it and that keys
// are in order. bbolt assumes all of this, even in its own check, and crashes or loops
// forever on a file where it does not hold. So a file is checked before bbolt maps it,
// except for a large one that is served: its branch pages are checked right after.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
)

// maxTreeDepth is the most levels of pages that are followed. No tree is as deep, since a
// branch page has at least two pages below it.
const maxTreeDepth = 64

// pageChecker checks the pages that a meta page leads to. It marks each page in uses when
// it reads it and follows no page twice, so that it ends even where pages form a cycle.
type pageChecker struct {
	f        *os.File
	pageSize int64     // in bytes
	uses     []pageUse // by page id
	// height is the level of the leaf pages, if they are only marked as used and not read,
	// or 0 if they are checked too. The root page is on level 1.
	height int
	levels [maxTreeDepth + 1]level // the pages between the root and the current page
	// report is called with each fault, a text for the operator.
	report func(fault string)
	// progress is called with the number of bytes checked since the last call. Its error
	// ends the check.
	progress func(bytes int64) error
}

// pageUse is the use of a page, as far as it is known.
type pageUse byte

const (
	pageLost pageUse = iota // no checked page refers to it
	pageFree                // in the freelist
	pageUsed
)

// level holds the page that is being checked on one level of a tree. The buffers are
// reused for the next page on the level.
type level struct {
	page     []byte // with its overflow pages
	elements []element
}

func (l *level) key(i int) []byte { return l.page[l.elements[i].key:l.elements[i].value] }

// element holds the offsets, from the start of the page, at which an element, its key and
// its value begin and at which its value ends. In a branch page, which has no values, value
// and end are both the end of the key.
type element struct{ at, key, value, end int }

// bounds are the limits that the branch page above sets for the keys of a page: the first
// key is first, and all keys are less than end. A limit that is nil is not known.
type bounds struct{ first, end []byte }

// pageElement names the place of a fault: a page, or an element of a page that is an inline
// bucket.
type pageElement struct {
	page    uint64
	element int // -1 for the page
}

func (p pageElement) String() string {
	if p.element < 0 {
		return fmt.Sprintf("page %d", p.page)
	}
	return fmt.Sprintf("page %d, element %d", p.page, p.element)
}

// newPageChecker returns a checker for a file of that many pages, of pageSize bytes each.
func newPageChecker(f *os.File, pageSize int64, pages uint64, report func(string), progress func(bytes int64) error) *pageChecker {
	c := &pageChecker{f: f, pageSize: pageSize, uses: make([]pageUse, pages), report: report, progress: progress}
	c.uses[0], c.uses[1] = pageUsed, pageUsed // the meta pages
	return c
}

// checkPages checks all pages of the transaction of a meta page. It calls report with each
// fault and progress with the number of bytes checked since the last call. It returns an
// error if the file cannot be read, or if progress returns one.
func checkPages(f *os.File, m meta, report func(string), progress func(bytes int64) error) error {
	broken := false
	c := newPageChecker(f, m.pageSize, m.pages, func(fault string) { broken = true; report(fault) }, progress)
	if err := c.checkFreelist(m.freelist); err != nil {
		return err
	}
	if err := c.checkTree(m.root, 1, bounds{}); err != nil {
		return err
	}
	for id, use := range c.uses {
		// The checker does not read the pages below a broken page, so they look lost.
		if use == pageLost && !broken {
			report(fmt.Sprintf("page %d is neither in use nor free", id))
		}
	}
	return nil
}

// maxSmallFile is the size, in bytes, of the largest file of which all pages are checked
// before it is served, which takes some 20 ms. Of a larger file only the branch pages are
// checked, in the background while it is served; the check command checks all of it.
const maxSmallFile = 32 << 20

// checkSmallFile checks all pages of a file of at most maxSmallFile, before bbolt maps it.
// It returns an error that wraps ErrDamaged if a page is broken, and false if the file is
// too large to be checked.
func checkSmallFile(f *os.File, m meta) (checked bool, err error) {
	if int64(m.pages)*m.pageSize > maxSmallFile {
		return false, nil
	}
	var first firstFault
	if err := checkPages(f, m, first.found, func(int64) error { return nil }); err != nil {
		return false, err
	}
	return true, first.err()
}

// firstFault keeps the first fault of a check, for callers that need only one.
type firstFault struct{ fault string }

// found records a fault.
func (f *firstFault) found(fault string) {
	if f.fault == "" {
		f.fault = fault
	}
}

// err returns an error that wraps ErrDamaged, or nil if no fault was reported.
func (f *firstFault) err() error {
	if f.fault == "" {
		return nil
	}
	return fmt.Errorf("%w: %s; restore a backup", ErrDamaged, f.fault)
}

// checkBranches checks the branch pages of the trees with these root pages, as checkPages
// does, but not the leaf pages. Branch pages are about a hundredth of the file. If none is
// broken, no search in the trees can run in a cycle of pages forever.
func checkBranches(f *os.File, pageSize int64, pages uint64, roots []uint64, report func(string), progress func(bytes int64) error) error {
	c := newPageChecker(f, pageSize, pages, report, progress)
	for _, root := range roots {
		var err error
		if c.height, err = c.heightOf(root); err != nil {
			return err
		}
		if err := c.checkTree(root, 1, bounds{}); err != nil {
			return err
		}
	}
	return nil
}

// heightOf returns the level of the leftmost leaf page of a tree, with the root page on
// level 1. All leaf pages of a tree are on the same level.
func (c *pageChecker) heightOf(root uint64) (height int, err error) {
	page := make([]byte, c.pageSize)
	for id := root; id < uint64(len(c.uses)) && height < maxTreeDepth; height++ {
		if _, err := c.f.ReadAt(page, int64(id)*c.pageSize); err != nil {
			return 0, fmt.Errorf("read page %d: %w", id, err)
		}
		child, ok := branchChild(page, nil)
		if !ok {
			return height + 1, nil
		}
		id = child
	}
	return height, nil
}

// checkFreelist checks the page that lists the ids of the free pages.
func (c *pageChecker) checkFreelist(id uint64) error {
	var l level
	if ok, err := c.readPage(id, &l); !ok || err != nil {
		return err
	}
	count, at, ok := freeCount(l.page)
	if !ok {
		c.report(fmt.Sprintf("page %d should hold the list of free pages, but does not", id))
		return nil
	}
	if count > (uint64(len(l.page))-at)/8 {
		c.report(fmt.Sprintf("the list of free pages has %d entries, more than fit in its page", count))
		return nil
	}
	for i := range count {
		c.markUse(binary.NativeEndian.Uint64(l.page[at+8*i:]), pageFree)
	}
	return c.progress(int64(count) * c.pageSize)
}

// readPage reads a page, with its overflow pages, into l and marks them all as used. It
// returns false if the page is broken, which it reports, or is in use already.
func (c *pageChecker) readPage(id uint64, l *level) (ok bool, err error) {
	if !c.markUse(id, pageUsed) {
		return false, nil
	}
	if int64(len(l.page)) < c.pageSize {
		l.page = make([]byte, c.pageSize)
	}
	l.page = l.page[:c.pageSize]
	if _, err := c.f.ReadAt(l.page, int64(id)*c.pageSize); err != nil {
		return false, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(binary.NativeEndian.Uint32(l.page[12:]))
	switch headerID := binary.NativeEndian.Uint64(l.page); {
	case headerID != id:
		c.report(fmt.Sprintf("page %d has the id %d in its header", id, headerID))
		return false, nil
	case id+overflow >= uint64(len(c.uses)):
		c.report(fmt.Sprintf("page %d overflows by %d pages, beyond the end of the file", id, overflow))
		return false, nil
	}
	for i := range overflow {
		if !c.markUse(id+1+i, pageUsed) {
			return false, nil
		}
	}
	if overflow > 0 {
		l.page = make([]byte, int64(overflow+1)*c.pageSize)
		if _, err := c.f.ReadAt(l.page, int64(id)*c.pageSize); err != nil {
			return false, fmt.Errorf("read page %d: %w", id, err)
		}
	}
	return true, c.progress(int64(len(l.page)))
}

// markUse records the use of a page. It reports a fault and returns false if the id is not
// that of a data page of the file, or if the page has a use already.
func (c *pageChecker) markUse(id uint64, as pageUse) bool {
	switch {
	case id < 2 || id >= uint64(len(c.uses)):
		c.report(fmt.Sprintf("a reference leads to page %d; the pages of this file are 2 to %d", id, len(c.uses)-1))
		return false
	case c.uses[id] == pageUsed:
		c.report(fmt.Sprintf("page %d is used twice", id))
		return false
	case c.uses[id] == pageFree:
		c.report(fmt.Sprintf("page %d is listed as free, and is in use or listed again", id))
		return false
	}
	c.uses[id] = as
	return true
}

// checkTree checks a page on the level depth, and all pages below it. It does not check
// the pages below a broken page.
func (c *pageChecker) checkTree(id uint64, depth int, b bounds) error {
	if depth == c.height {
		c.markUse(id, pageUsed)
		return nil
	}
	if depth > maxTreeDepth {
		c.report(fmt.Sprintf("page %d is more than %d levels deep, which no database is", id, maxTreeDepth))
		return nil
	}
	l := &c.levels[depth]
	if ok, err := c.readPage(id, l); !ok || err != nil {
		return err
	}
	where := pageElement{id, -1}
	switch binary.NativeEndian.Uint16(l.page[8:]) {
	case branchPageFlag:
		if !c.parseElements(where, l, 0, 4, 0) {
			return nil
		}
		if len(l.elements) == 0 {
			c.report(where.String() + " is a branch page without elements")
		}
		c.checkOrder(where, l, b)
		for i, e := range l.elements {
			below := bounds{l.key(i), b.end}
			if i+1 < len(l.elements) {
				below.end = l.key(i + 1)
			}
			if err := c.checkTree(binary.NativeEndian.Uint64(l.page[e.at+8:]), depth+1, below); err != nil {
				return err
			}
		}
	case leafPageFlag:
		// An empty bucket is inline in its parent, so that no leaf page is empty.
		if binary.NativeEndian.Uint16(l.page[10:]) == 0 {
			c.report(where.String() + " is a leaf page without elements")
		}
		for _, root := range c.checkLeaf(where, l, b) {
			if err := c.checkTree(root, depth+1, bounds{}); err != nil {
				return err
			}
		}
	default:
		c.report(where.String() + " is neither a branch page nor a leaf page")
	}
	return nil
}

// checkLeaf checks the elements of a leaf page. It returns the ids of the root pages of the
// buckets in it. An inline bucket has no page of its own and is checked at once.
func (c *pageChecker) checkLeaf(where pageElement, l *level, b bounds) (roots []uint64) {
	if !c.parseElements(where, l, 4, 8, 12) {
		return nil
	}
	c.checkOrder(where, l, b)
	for i, e := range l.elements {
		switch binary.NativeEndian.Uint32(l.page[e.at:]) {
		case 0:
			continue
		case bucketLeafFlag:
		default:
			c.report(fmt.Sprintf("%s has an element %d of an unknown kind", where, i))
			continue
		}
		bucket := l.page[e.value:e.end]
		switch {
		case len(bucket) < bucketHeaderSize:
			c.report(fmt.Sprintf("%s has an element %d that is a bucket of %d bytes, fewer than its header has", where, i, len(bucket)))
		case binary.NativeEndian.Uint64(bucket) != 0:
			roots = append(roots, binary.NativeEndian.Uint64(bucket))
		default:
			inline := &level{page: bucket[bucketHeaderSize:]}
			inside := pageElement{where.page, i}
			switch {
			case len(inline.page) < pageHeaderSize || binary.NativeEndian.Uint16(inline.page[8:]) != leafPageFlag:
				c.report(inside.String() + " is an inline bucket without a leaf page")
			case binary.NativeEndian.Uint16(inline.page[10:]) == 0 && len(inline.page) > pageHeaderSize:
				c.report(inside.String() + " is an empty inline bucket, but has bytes after its header")
			case len(c.checkLeaf(inside, inline, bounds{})) > 0:
				c.report(inside.String() + " is an inline bucket that contains a bucket")
			}
		}
	}
	return roots
}

// parseElements fills l.elements. It reports a fault and returns false if an element is not
// where bbolt puts it: the keys and values follow one another without gaps, in the order of
// the elements, after the last element. pos, keySize and valueSize are the offsets in an
// element at which it has the position of its key and the sizes of key and value, in bytes;
// a valueSize of 0 means that the elements have no value.
func (c *pageChecker) parseElements(where pageElement, l *level, pos, keySize, valueSize int) bool {
	l.elements = l.elements[:0]
	count := int(binary.NativeEndian.Uint16(l.page[10:]))
	next := pageHeaderSize + count*elementSize
	u32 := func(at int) int64 { return int64(binary.NativeEndian.Uint32(l.page[at:])) }
	for i := range count {
		at := pageHeaderSize + i*elementSize
		if next > len(l.page) || int64(at)+u32(at+pos) != int64(next) {
			c.report(fmt.Sprintf("%s has its element %d at a wrong position", where, i))
			return false
		}
		value := int64(next) + u32(at+keySize)
		end := value
		if valueSize > 0 {
			end += u32(at + valueSize)
		}
		if end > int64(len(l.page)) {
			c.report(fmt.Sprintf("%s has an element %d that ends outside the page", where, i))
			return false
		}
		l.elements = append(l.elements, element{at, next, int(value), int(end)})
		next = int(end)
	}
	return true
}

// checkOrder checks that the keys of a page are in order and within b, after parseElements.
func (c *pageChecker) checkOrder(where pageElement, l *level, b bounds) {
	n := len(l.elements)
	if n == 0 {
		return
	}
	if b.first != nil && !bytes.Equal(l.key(0), b.first) {
		c.report(fmt.Sprintf("%s does not begin with the key that its branch page has for it", where))
	}
	for i := 1; i < n; i++ {
		if bytes.Compare(l.key(i-1), l.key(i)) >= 0 {
			c.report(fmt.Sprintf("%s has the key of its element %d out of order", where, i))
		}
	}
	if b.end != nil && bytes.Compare(l.key(n-1), b.end) >= 0 {
		c.report(fmt.Sprintf("%s ends with a key that belongs to the next page", where))
	}
}
